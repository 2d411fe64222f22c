#!/usr/bin/env bash
# Starts a program on this node. run_stages.sh runs it on every node of a job at once; by hand:
#
#     slurm/lib/launch.sh scripts/cpt.py --config recipes/NAME/STAGE.yaml [--max_steps 10 ...]
#
# Programs that train get a process for each GPU of each node, under DILQUR_ACCELERATE_CONFIG (an accelerate config; the default is
# fsdp2.yaml, and ddp.yaml for mlm.py and sft.py); with one process in all, and for every other program: plain python, on the first node.
# check_nodes.py runs on every node, and starts its processes by itself.
# DILQUR_NUM_PROCESSES: processes per node where there is no GPU. DILQUR_PORT: of the first node, instead of one from the job's number.
# DILQUR_MODULES, DILQUR_VENV, DILQUR_IMAGE, DILQUR_LOCAL_DIR: slurm/site.env.example.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source slurm/lib/messages.sh
(($#)) || die "usage: slurm/lib/launch.sh PROGRAM --config RECIPE.yaml [FLAGS ...]"
program=$1
shift

# -- environment ----------------------------------------------------------------------------------------------------------

source slurm/lib/read_site.sh
if [[ -n ${DILQUR_MODULES:-} && -z ${APPTAINER_CONTAINER:-} ]]; then
  load_modules
fi
find_python
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # accelerate adds the working folder for DeepSpeed only
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240} # after a TERM, to save in; its default is 30 s
export PYTHONUNBUFFERED=1                         # or a killed job's last lines are missing from its log
# Compute nodes have no network: say so, or every look-up waits for a timeout.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export WANDB_MODE=${WANDB_MODE:-offline}
# Threads that wait spin by default, and starve each other where a core has two of them: on a CPU, or in the loaders of a GPU job.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# As the published systems set it: blocks that grow, instead of blocks of sizes that are not asked for again.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}
# On node-local disk, and each job its own: kernels compiled on a network file system get torn.
cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/dilqur-${USER:-$(id -un)}-${SLURM_JOB_ID:-local}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
source slurm/lib/enter_image.sh

# -- how many processes, and where ----------------------------------------------------------------------------------------

# Of the step, not of the job: inside an allocation, but without srun, this is the only node.
nodes=${SLURM_STEP_NUM_NODES:-1} node=0
if ((nodes > 1)); then
  node=$SLURM_NODEID
fi
gpus() {
  local listed
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    echo "$SLURM_GPUS_ON_NODE"
  elif [[ -v CUDA_VISIBLE_DEVICES ]]; then # nvidia-smi does not look at it; empty or -1: none
    IFS=, read -ra listed <<<"${CUDA_VISIBLE_DEVICES#-1}"
    echo "${#listed[@]}"
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  fi
}
here=1 default=accelerate_configs/fsdp2.yaml
case $program in
  scripts/cpt.py | scripts/mlm.py | scripts/sft.py | scripts/check_nodes.py)
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false} # its threads do not survive the fork of data workers
    here=$(gpus)
    ((here > 0)) || here=${DILQUR_NUM_PROCESSES:-1}
    [[ $program == scripts/cpt.py ]] || default=accelerate_configs/ddp.yaml # an adapter and an encoder fit on one GPU whole
    [[ -z ${DILQUR_LOCAL_DIR:-} || $program == scripts/sft.py || "$*" == *--local_dir* ]] || set -- "$@" --local_dir "$DILQUR_LOCAL_DIR"
    ;;
  *)
    ((node == 0)) || exit 0
    nodes=1
    ;;
esac
processes=$((nodes * here))
if ((processes == 1)); then
  [[ -z ${DILQUR_ACCELERATE_CONFIG:-} ]] || echo "warning: one process only: DILQUR_ACCELERATE_CONFIG=$DILQUR_ACCELERATE_CONFIG is not used" >&2
  exec python "$program" "$@"
fi

# -- the launcher ---------------------------------------------------------------------------------------------------------

machines=() port=0 where=(--machine_rank "$node") # 0: a free one, several runs may share the node
if ((nodes > 1)); then
  mapfile -t hosts <<<"${DILQUR_HOSTS:-$(scontrol show hostnames "${SLURM_STEP_NODELIST:-}")}"
  machines=(--machines "${hosts[@]}")
  port=${DILQUR_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  where+=(--main_process_ip "${hosts[0]}")
fi
where=(--num_machines "$nodes" --num_processes "$processes" "${where[@]}" --main_process_port "$port")
if [[ $program == scripts/check_nodes.py ]]; then # it looks for what would make accelerate wait for ever
  exec python "$program" "${where[@]}" "${machines[@]}" "$@"
fi

strategy=${DILQUR_ACCELERATE_CONFIG:-$default}
[[ -f $strategy ]] ||
  die "DILQUR_ACCELERATE_CONFIG: $strategy: no such file; there are: $(echo accelerate_configs/*.yaml)"
# accelerate would bury a one-line error and turn its exit code into 1: hear it first, and whether there is anything to do.
# All nodes ask, since all must agree; another node may see a file up to a minute later than the one that wrote it (NFS).
tries=1
if ((node > 0)); then
  tries=7
  trap 'exit 0' TERM # srun ends the step with the highest exit code: let it be the first node's, not 143
fi
for ((try = 1; ; try++)); do
  code=0
  said=$(WORLD_SIZE=$processes DILQUR_ACCELERATE_CONFIG=$strategy python "$program" "$@" --check 2>&1) || code=$?
  ((code != 0 && try < tries)) || break
  sleep 10
done
if ((code != 0)); then
  echo "$said" >&2
  exit "$code"
fi
if [[ $said == *", nothing to do ("* && "$*" != *--overwrite_output_dir* ]]; then
  ((node != 0)) || echo "$said"
  exit 0
fi

# torch would wait a quarter of an hour for a node that it cannot reach, and take a foreign server for the first one. Nobody listens
# yet: a refused connection is a good sign.
find_the_first_node() {
  local said try
  for try in 1 2 3; do
    said=$(timeout 10 bash -c ": <>/dev/tcp/$1/$2" 2>&1) && {
      ((node == 0)) || return 0 # it was faster
      die "port $2 of $1 is in use: set DILQUR_PORT to another"
    }
    [[ $said != *"Connection refused"* ]] || return 0
    ((try == 3)) || sleep 2
  done
  said=$(sed -n 's/^bash: [^/]*: \(.*\)$/\1/p' <<<"$said" | head -n 1)
  die "$(hostname) cannot reach $1, port $2 (${said:-no answer in 10 s}): a firewall, or a name that means another network;" \
    "leave out the node with DILQUR_EXCLUDE in slurm/site.env"
}

if ((nodes > 1)); then
  find_the_first_node "${hosts[0]}" "$port"
  where+=(--rdzv_backend static)
fi
if grep -q '^parallelism_config:' "$strategy"; then # HSDP: sharded over a node's GPUs, replicated over nodes
  where+=(--parallelism_config_dp_replicate_size "$nodes" --parallelism_config_dp_shard_size "$here")
fi
threads=$(($(nproc) / here))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} # accelerate's default is one
exec accelerate launch --config_file "$strategy" "${where[@]}" "$program" "$@"
