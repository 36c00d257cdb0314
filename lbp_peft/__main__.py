"""`python -m lbp_peft`, the same as `lbp-peft`."""

from .cli import main

if __name__ == "__main__":
    main()
