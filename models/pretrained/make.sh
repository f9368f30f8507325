#!/usr/bin/env bash
# Train, evaluate and publish the models of this folder, from the commit that is checked out, in clones of their own.
#
#     models/pretrained/make.sh [MODEL] [-S key=value ...]     # without a name: all, one after the other
#
# torchvision downloads the data into data/raw; where it cannot, put it there: torchvision's files, or an .npz that
# is named by -S prepare.source=npz:data/raw/cifar100.npz.
set -euo pipefail
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
declare -A recipes=(
    [fashion-convnet3]="-S setting=fashion"
    [cifar100-convnet3]="-S setting=cifar100"
    [cifar100-convnet3_multilevel]="-S setting=cifar100 -S target=convnet3_multilevel -S model.penalty=leave_one_out"
)
names=("${!recipes[@]}")
if [[ -v recipes[${1:-none}] ]]; then
    names=("$1")
    shift
fi
for name in "${names[@]}"; do
    clone=$(mktemp -d)
    git clone --quiet "$root" "$clone/pudnet"
    mkdir -p "$root/data/raw" "$clone/pudnet/data"
    ln -s "$root/data/raw" "$clone/pudnet/data/raw"
    (
        cd "$clone/pudnet"
        export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$PWD"
        # PudNet+ has no eta and no depth to search for, so that the search is one short trial.
        # shellcheck disable=SC2086 # a recipe is several words
        dvc exp run evaluate ${recipes[$name]} -S variant=pudnet_plus -S groups.train_groups=5000 \
            -S groups.search_groups=20 "$@"
        python -m pipeline.publish
        cp "models/pretrained/$name".* "$root/models/pretrained/"
    )
    rm -rf "$clone"
done
