#!/usr/bin/env bash
# Inside a SLURM job: a run or a stage on all nodes of the job, by one launcher on each. It is the driver's --launcher there.
#
#   bash scripts/srun_stage.sh scripts/distill_bi2cross.py --model_name_or_path ...
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD_NODE
# Since SLURM 22.05 srun does not ask for the processors that the job was given for each task. One node that fails ends the
# stage on all of them.
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash "$here/launch_node.sh" "$@"
