#!/bin/bash
# Training on several hosts that are reached by ssh. In the root of the repository:
#
#   examples/jobs/ssh.sh "node1 node2" --num-gpus 2 --resume \
#     --config-file configs/coco/standard-10.yaml OUTPUT_DIR output/mine
#
# Repository, data and OUTPUT_DIR need the same paths on all hosts, and OUTPUT_DIR must be on a disk
# that they share. ssh must not ask for a password. All hosts run .venv/bin/python (PYTHON=...). The
# other hosts connect to the first one, at port 29500 (PORT=...). Ctrl-C here ends the training on
# all hosts.
set -u
read -ra hosts <<< "${1:?give the hosts as one argument, such as \"node1 node2\"}"
shift
port=${PORT:-29500}
python=${PYTHON:-.venv/bin/python}

# What the hosts get from this environment, if it is set here.
variables=()
for name in GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS; do
  if [ -n "${!name+set}" ]; then variables+=("$name=${!name}"); fi
done

pids=()
trap 'kill "${pids[@]}" 2> /dev/null' INT TERM
for rank in "${!hosts[@]}"; do
  program=(env "${variables[@]}" "$python" train_net.py "$@" --num-machines "${#hosts[@]}"
    --machine-rank "$rank" --dist-url "tcp://${hosts[0]}:$port")
  # -tt: the program on the host ends when this ssh does.
  ssh -tt "${hosts[$rank]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${program[@]}")" \
    < /dev/null &
  pids+=($!)
done

# If one host fails, the others end by themselves.
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit $status
