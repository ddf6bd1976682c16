# shellcheck shell=bash
# shellcheck disable=SC2034  # used by the scripts that source this file
# Settings of this cluster: the one file to edit. Whatever the environment sets wins over it:
#   CODECSSL_PARTITION=gpu CODECSSL_GPUS=8 bash slurm/pretrain.sbatch ...

# Where to submit. Empty means: what the cluster does by itself.
: "${CODECSSL_PARTITION:=}"      # for everything, unless one of the next two says otherwise
: "${CODECSSL_CPU_PARTITION:=$CODECSSL_PARTITION}"
: "${CODECSSL_GPU_PARTITION:=$CODECSSL_PARTITION}"
: "${CODECSSL_ACCOUNT:=}"
: "${CODECSSL_QOS:=}"
: "${CODECSSL_SBATCH:=}"         # more options of sbatch for every job, such as "--mem=0 --exclude=node13"

# Software.
: "${CODECSSL_PYTHON:=python3}"  # of the environment that codecssl is installed in; best an absolute path
: "${CODECSSL_SETUP:=}"          # shell code at the start of each job: "module load cuda; source ~/venv/bin/activate"
: "${CODECSSL_CONTAINER:=}"      # before each python: "apptainer exec --nv --bind /data,/scratch image.sif"
: "${CODECSSL_SCRATCH:=}"        # a disk of each node: pretraining copies its shards there first. Empty: no copy

# Resources. A GPU count of 0 means CPUs: device cpu, gloo.
: "${CODECSSL_NODES:=1}"         # of a pretraining job
: "${CODECSSL_GPUS:=1}"          # per node of a pretraining job, one process each
: "${CODECSSL_TASK_GPUS:=0}"     # per tokenize, label and superb job, 0 or 1
: "${CODECSSL_CPUS:=8}"          # per process
: "${CODECSSL_TIME:=24:00:00}"   # limit of each job; a longer job continues in the next one

# Limits and retries.
# Seconds before the time limit at which a job is warned, to write a checkpoint or finish a block. This file does not reach
# a script that is submitted by sbatch itself: there, the line "#SBATCH --signal" in the script has the seconds.
: "${CODECSSL_WARN_SECONDS:=300}"
: "${CODECSSL_STALL_MINUTES:=120}"  # tokenize: stuck if no input is finished for this long (pretrain: log.stall_minutes)
: "${CODECSSL_RETRIES:=3}"          # requeues in a row without progress, after crashes, hangs or warnings
: "${CODECSSL_LOGS:=logs}"          # folder of the jobs' output
