#!/usr/bin/env bash
# On each node of a run or a stage, started by srun_stage.sh: Accelerate's launcher, with a process for each GPU, or one.
set -euo pipefail

trap '' USR1  # meant for the stage; what this shell starts ignores it too, until the stage asks for it
# The launcher, not SLURM, decides which process is the first and reports: every node's words are the job's, too.
exec > >(tee -a "$LOGS/$SLURM_JOB_ID-node-$SLURM_NODEID.log") 2>&1

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
config=${ACCELERATE_CONFIG:-$here/../accelerate_configs/multi_gpu.yaml}
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
processes=$((SLURM_JOB_NUM_NODES * (gpus ? gpus : 1)))
if ((processes == 1)); then
  config=$here/../accelerate_configs/cpu.yaml
  ((gpus)) && exec accelerate-launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "$@"
elif ((gpus == 0)) && grep -q "^distributed_type: MULTI_GPU" "$config"; then
  export ACCELERATE_USE_CPU=true  # plain data parallelism over gloo
fi
# The node's name for the others, which know it by SLURM's; many a machine takes itself for "localhost".
export PET_LOCAL_ADDR=${PET_LOCAL_ADDR-$SLURMD_NODENAME}
# The first node keeps the list of all, at a port of the job's own.
exec accelerate-launch --config_file "$config" --num_processes "$processes" --num_machines "$SLURM_JOB_NUM_NODES" \
  --machine_rank "$SLURM_NODEID" --rdzv_backend c10d --rdzv_conf is_host=$((SLURM_NODEID == 0)) \
  --main_process_ip "$HEAD_NODE" --main_process_port $((20000 + SLURM_JOB_ID % 20000)) "$@"
