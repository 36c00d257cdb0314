"""Operations with an exact forward pass and a cheaper backward pass. They know nothing of PEFT."""
