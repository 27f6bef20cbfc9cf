#!/usr/bin/env bash
# Translate a folder on a Slurm cluster, one process per GPU. Copy this file, edit what is marked, and: sbatch slurm.sh
#
# A job that ends early (time limit, pre-emption, a lost node) resumes when submitted again: images that are already
# present are kept, and the result is that of a job which was never stopped. Do not give --overwrite for that.

#SBATCH --job-name=sddm
#SBATCH --nodes=1                # edit: machines
#SBATCH --ntasks-per-node=4      # edit: processes per machine, as many as GPUs
#SBATCH --gpus-per-node=4        # edit
#SBATCH --cpus-per-task=4        # reading and writing images
#SBATCH --mem-per-cpu=4G
#SBATCH --time=04:00:00          # edit
#SBATCH --output=sddm-%j.log
#SBATCH --open-mode=append       # a requeued job appends to the same log
#SBATCH --requeue                # after pre-emption Slurm starts the job again by itself
#SBATCH --signal=TERM@60         # a minute before the time limit: stop cleanly and say how much is done

set -euo pipefail
cd "${SDDM_ROOT:-$SLURM_SUBMIT_DIR}"                   # edit: where the repository lies, on a file system of all nodes
PYTHON="${PYTHON:-.venv/bin/python}"                   # edit: an interpreter with requirements.txt installed
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-4}"     # or every process would use all cores

# Do not bind GPUs to tasks (no --gpus-per-task, no --gpu-bind): each process takes the GPU of its number on the machine.
# --kill-on-bad-exit: when one process dies, all do, and at once. The processes find each other through a port that is
# worked out from the job's number; export MASTER_PORT=... to choose another.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-4}" "$PYTHON" scripts/ae_sample.py \
    --preset cat2dog \
    --base_samples data/afhq/val/cat \
    --save_dir output/slurm \
    --batch_size 16 --seed 0 \
    "$@"
# edit: the flags above; those given to sbatch after the file's name are added, as in: sbatch slurm.sh --seed 1
