#!/usr/bin/env bash
# Measures on a GPU, within 25 minutes, what only a GPU can tell:
#
#   bash benchmarks/on_a_gpu.sh [--tiny] OUTPUT [IMAGES]
#
#   OUTPUT  a folder for all results: a log of each stage, and stages.txt with how each ended
#   IMAGES  an archive or a folder of images in train/CLASS and test/CLASS, to train the table's
#           first column on; without it that stage is left out
#   --tiny  small sizes on whatever device there is, to try the script itself
#
# The Python is that of the variable PYTHON, or `python`, and has what `pip install -e '.[test,cuda]'`
# brings; where it has PyTorch, that is measured too. Stages follow each other in the order of their
# worth; one that fails or takes too long does not stop the next. The same command again runs the tests
# anew, and measures what is missing. Exit code 0: all stages ended well; 1: some did not; 2: refused;
# 130: Ctrl-C.
set -uo pipefail
python=${PYTHON:-python}
case $python in */*) python=$(realpath -s "$python") ;; esac
name=on_a_gpu.sh

refuse() { echo "$name: $1" >&2; exit 2; }

usage() { sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; }

tiny=
positional=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit 0 ;;
    --tiny) tiny=yes ;;
    -*) refuse "unknown option $argument; see --help" ;;
    *) positional+=("$argument") ;;
  esac
done
case ${#positional[@]} in
  1 | 2) ;;
  *) refuse "a folder for the results is needed, and at most images beside it; see --help" ;;
esac
images=${positional[1]:-}
if [ -n "$images" ]; then
  [ -e "$images" ] || refuse "there is no $images"
  images=$(realpath "$images")
fi
output=$(realpath -m "${positional[0]}")
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
backend=$("$python" -c 'import jax; print(jax.default_backend())' 2>&1) ||
  refuse "JAX does not work with $python: ${backend##*$'\n'}"
backend=${backend##*$'\n'} # behind warnings
if [ "$backend" != gpu ] && [ -z "$tiny" ]; then
  refuse "JAX with $python sees no GPU but a $backend; with --tiny the script is tried on that"
fi

mkdir -p "$output" || refuse "cannot create $output"

# The tests share the GPU between processes, and PyTorch takes its part beside JAX.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
torch=()
if "$python" -c 'import sys, torch; sys.exit(sys.argv[1] == "gpu" and not torch.cuda.is_available())' \
  "$backend" 2>/dev/null; then torch=(--torch); fi

trap 'echo "$name: interrupted; the same command goes on from what is in $output" >&2; exit 130' INT
failed=0

stage() { # NAME SECONDS COMMAND...: a signal after so many seconds; at SIGTERM our commands save
  local stage=$1 seconds=$2 began=$SECONDS code
  shift 2
  printf '\n== %s\n' "$stage"
  timeout --foreground --signal="${signal:-TERM}" --kill-after=90 "$seconds" "$@" 2>&1 |
    tee --append --ignore-interrupts "$output/$stage.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) ;;
    124 | 137) failed=1 code="$code (stopped after its $seconds s)" ;;
    *) failed=1 ;;
  esac
  echo "$stage: exit code $code after $((SECONDS - began)) s" | tee -a "$output/stages.txt"
}

if [ -n "$tiny" ]; then
  tests=(spherical_optax tests/library/test_platforms.py)
  steps=(--models resnet20 --optimizers "adam,adam_srt" --rounds 3)
  wide=(--models resnet20 --batch_sizes 8 --rounds 2)
  narrow=(--models resnet20 --batch_sizes 16 --rounds 2)
  table=(--seeds 1 --epochs 1 --optimizers sgd)
else
  # Those of one device; what a CPU's programs move, and meshes of eight devices, are held elsewhere.
  tests=(tests/library/test_{adamp,constraints,edges,geometry,goldens,hyperball,measures}.py
    tests/library/test_{optimizers,oracles,platforms,relatives,symmetries,theory}.py)
  steps=(--models "resnet18,transformer" --rounds 10)
  steps+=(--optimizers "adam,adam_s,adam_srt,adam_g,sgd_mrt,adam_h,rotational")
  wide=(--models resnet18 --precisions bfloat16 --batch_sizes 512 --seeds 1 --epoch)
  narrow=(--models resnet20 --precisions float32 --batch_sizes 128 --seeds 1 --epoch)
  table=(--seeds 3 --epochs 20 --optimizers "adam,adamsrt,adams,sgd,sgdmrt")
fi

date >>"$output/stages.txt" || refuse "cannot write to $output"
# Ended by Ctrl-C, pytest says what it has seen.
signal=INT stage tests 170 "$python" -m pytest -q "${tests[@]}"
stage optimizer_step 270 "$python" benchmarks/optimizer_step.py \
  "${steps[@]}" "${torch[@]}" --output "$output/optimizer_step"
stage throughput_of_resnet18 230 "$python" benchmarks/training_throughput.py \
  "${wide[@]}" "${torch[@]}" --output "$output/training_throughput"
stage throughput_of_resnet20 150 "$python" benchmarks/training_throughput.py \
  "${narrow[@]}" "${torch[@]}" --output "$output/training_throughput"
if [ -n "$images" ]; then
  stage table 600 "$python" benchmarks/reproduce_table.py --settings cifar10/resnet20 \
    "${table[@]}" --dataset "folder:$images" --output "$output/table"
else
  echo "table: left out, as no images were given" | tee -a "$output/stages.txt"
fi
stage predictions 30 "$python" benchmarks/compiled_for_gpu.py \
  --output benchmarks/results/compiled_for_gpu --beside "$output/optimizer_step"

printf '\n== how the stages ended\n'
cat "$output/stages.txt"
exit "$failed"
