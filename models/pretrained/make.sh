#!/usr/bin/env bash
# Train, evaluate and publish the models of this folder, from the commit that is checked out, in clones of their own.
#
#     models/pretrained/make.sh [fashion|cifar100] [-S key=value ...]     # both, one after the other, without a name
#
# torchvision downloads the data into data/raw; where it cannot, put it there: torchvision's files, or an .npz that
# is named by -S prepare.source=npz:data/raw/cifar100.npz.
set -euo pipefail
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
names=(fashion cifar100)
if [[ ${1:-} == fashion || ${1:-} == cifar100 ]]; then
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
        dvc exp run evaluate -S "setting=$name" -S variant=pudnet_plus -S model.penalty=leave_one_out \
            -S model.blocks=leave_one_out -S groups.train_groups=5000 -S groups.search_groups=20 "$@"
        python -m pipeline.publish
        cp models/pretrained/"$name"-convnet3.* "$root/models/pretrained/"
    )
    rm -rf "$clone"
done
