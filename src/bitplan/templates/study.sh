#!/bin/sh
# Written by bitplan @version@: a study with llama.cpp's own tools. Every variant is quantized,
# measured against the reference and deleted before the next. Run it from anywhere; give variables
# in the environment to change them: THREADS=4 sh FILE
set -eu

HERE=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
QUANTIZE=${QUANTIZE:-llama-quantize}
PERPLEXITY=${PERPLEXITY:-llama-perplexity}
THREADS=${THREADS:-@threads@}
GPU_LAYERS=${GPU_LAYERS:-0}
WORK=${WORK:-$HERE/@stem@.work}
@top@

failed() {
    echo "failed: $1, see $2" >&2
    tail -n 5 "$2" >&2
    exit 1
}

quantize() {
    "$QUANTIZE" "$@" >"$WORK/quantize.log" 2>&1 || failed "$QUANTIZE" "$WORK/quantize.log"
}

# llama-perplexity may end before all that it has to say is written, so it is run until $1 is there
perplexity() {
    log=$WORK/perplexity.log
    wanted=$1
    shift
    for _ in 1 2 3 4 5 6 7 8 9; do
        "$PERPLEXITY" -f "$TEXT" --no-escape -c "$CTX" --chunks "$WINDOWS" -t "$THREADS" \
            -ngl "$GPU_LAYERS" --kl-divergence-base "$WORK/reference.kld" "$@" >"$log" 2>&1 ||
            failed "$PERPLEXITY" "$log"
        if grep -q "$wanted.*[0-9]" "$log"; then return; fi
    done
    failed "$PERPLEXITY (it did not say '$wanted')" "$log"
}

# the rest of the line with $1, spaces squeezed
figure() {
    sed -n "s/^.*$1 *[:=] *//p" "$WORK/perplexity.log" | tr -s ' ' | sed 's|+/-|±|'
}

bytes() {
    wc -c <"$1" | tr -d ' '
}

row() {
    printf '%-32s %14s  %-24s %s\n' "$1" "$2" "$3" "$4"
}

reference() {
    perplexity 'Final estimate: PPL' -m "$MODEL"
    row variant bytes perplexity KL
    row reference "$(bytes "$MODEL")" "$(figure 'Final estimate: PPL')" -
}

measure() {
    perplexity 'Mean  *KLD' -m "$WORK/variant.gguf" --kl-divergence
    row "$1" "$(bytes "$WORK/variant.gguf")" "$(figure 'Mean PPL(Q)')" "$(figure 'Mean  *KLD')"
    rm -f "$WORK/variant.gguf"
}

mkdir -p "$WORK"
trap 'rm -f "$WORK/variant.gguf" "$WORK/reference.kld"' EXIT
