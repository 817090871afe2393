#!/bin/bash
# Jobs after one another, each if the one before it has ended well; each can be put back into the queue meanwhile:
#
#   bash slurm/chain.sh slurm/one_node.sbatch \
#     "fit --config configs/vlm_r3_7b_sft.yaml --run_dir runs/7b_sft" \
#     "fit --config configs/vlm_r3_7b_rgrpo.yaml --run_dir runs/7b --model.init_args.init_from runs/7b_sft/last.ckpt"
#
# Prints the jobs' numbers. Options of sbatch that all of them take: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT
# and so on (`man sbatch`, input environment variables). Those that differ: a file of one's own instead of one_node.sbatch.
set -euo pipefail
file=$1
shift
after=()
for stage in "$@"; do
    read -ra words <<<"$stage"
    job=$(sbatch --parsable "${after[@]}" "$file" "${words[@]}")
    echo "${job%%;*}"               # behind a semicolon comes the cluster, if there are several
    after=(--dependency="afterok:${job%%;*}" --kill-on-invalid-dep=yes)
done
