#!/usr/bin/env bash
# Train, evaluate and publish the models of this folder, from the commit that is checked out, in clones of their own.
#
#     models/pretrained/make.sh [fashion|cifar100 [pudnet_plus|pretrained_ridge]] [-S key=value ...]
#
# Without a name, all four, one after the other. torchvision downloads the data into data/raw; where it cannot, put it
# there: torchvision's files, or an .npz that is named by -S prepare.source=npz:data/raw/cifar100.npz.
set -euo pipefail
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
names=(fashion cifar100)
variants=(pudnet_plus pretrained_ridge)
if [[ ${1:-} == fashion || ${1:-} == cifar100 ]]; then
    names=("$1")
    shift
fi
if [[ ${1:-} == pudnet_plus || ${1:-} == pretrained_ridge ]]; then
    variants=("$1")
    shift
fi
make_model() { # setting, variant, options
    local name=$1 variant=$2 augment=() clone
    shift 2
    if [[ $variant == pretrained_ridge ]]; then
        augment=(-S train.augment=shift_mirror) # which helps it, and not PudNet+
    fi
    clone=$(mktemp -d)
    git clone --quiet "$root" "$clone/pudnet"
    mkdir -p "$root/data/raw" "$clone/pudnet/data"
    ln -s "$root/data/raw" "$clone/pudnet/data/raw"
    (
        cd "$clone/pudnet"
        export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$PWD"
        # These variants have no eta and no depth to search for, so that the search is one short trial.
        dvc exp run evaluate -S "setting=$name" -S "variant=$variant" -S model.penalty=leave_one_out \
            -S model.blocks=leave_one_out -S groups.train_groups=5000 -S groups.search_groups=20 "${augment[@]}" "$@"
        rm models/pretrained/*.safetensors models/pretrained/*.md # so that only the new one is copied
        python -m pipeline.publish
        cp models/pretrained/"$name"-convnet3*.{safetensors,md} "$root/models/pretrained/"
    )
    rm -rf "$clone"
}
for name in "${names[@]}"; do
    for variant in "${variants[@]}"; do
        make_model "$name" "$variant" "$@"
    done
done
