#!/bin/bash
# Several machines under Slurm, one launcher on each:
#     sbatch examples/configs/slurm.sh examples/image_classification.py --model ... --output /shared/run --resume
# With --resume a job that was stopped and queued again continues from its last checkpoint; the first time there is none,
# and it starts from the beginning. The output folder has to lie on a file system that all machines share.
#SBATCH --job-name=lbp-peft
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --output=%x-%j.txt
set -euo pipefail

CONFIG=${CONFIG:-examples/configs/ddp_nodes.yaml} # or fsdp2_nodes.yaml
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into `head`, whose end could stop scontrol and so this
HEAD=${HOSTS%%$'\n'*}
PORT=$((20000 + SLURM_JOB_ID % 20000))

# shellcheck disable=SC2016  # SLURM_NODEID is of each machine
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --config_file "$0" --num_machines "$1" --num_processes "$2" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$3" --main_process_port "$4" "${@:5}"' \
    "$CONFIG" "$SLURM_NNODES" "$((SLURM_NNODES * GPUS_PER_NODE))" "$HEAD" "$PORT" "$@"
