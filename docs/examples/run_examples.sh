#!/usr/bin/env bash
# Runs every example on one model: run_examples.sh MODEL
# MODEL is a Hugging Face directory, a .gguf file or a directory that holds one. PYTHON names the interpreter.
set -euo pipefail
model=${1:?usage: run_examples.sh MODEL}
examples="$(dirname "${BASH_SOURCE[0]}")/llm_examples.py"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

run() { "${PYTHON:-python3}" "$examples" --hf_model_dir "$model" --dump_engine_dir "$scratch/engine" "$@"; }

# For tasks that not every version and machine can run: exit code 3 means that, and the message says what is missing.
run_if_available() { run "$@" || [[ $? == 3 ]]; }

run --streaming \
    --task run_llm_from_huggingface_model \
    --task run_llm_from_engine \
    --task run_llm_generate_async_example
run_if_available --task run_llm_with_quantization --quant_type int8
run_if_available --task run_llm_with_quantization --quant_type int4
run_if_available --task run_llm_on_tensor_parallel --tp_size 2
