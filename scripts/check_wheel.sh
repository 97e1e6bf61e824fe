#!/bin/sh
# Builds the source distribution, from it the wheel, and uses the wheel in a fresh environment, from an
# empty folder. Both stay in dist/. PYTHON must have torch and the build tools: make wheel-check has them.
set -eu
cd "$(dirname "$0")/.."
ROOT=$PWD
PYTHON=${PYTHON:-.venv/bin/python}
TORCH=${TORCH:-torch==2.13.0}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

rm -rf dist
"$PYTHON" -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >"$place/sdist.log"
"$PYTHON" -m pip wheel -q --no-build-isolation --no-deps -w dist dist/fastalign-*.tar.gz
wheel=$(ls "$ROOT"/dist/fastalign-*-cp310-abi3-*.whl)

"$PYTHON" - "$wheel" <<'PYTHON'
import subprocess, sys, zipfile
held = set(zipfile.ZipFile(sys.argv[1]).namelist())
tree = subprocess.run(["git", "ls-files", "fastalign", "kernels"], capture_output=True, text=True, check=True)
wanted = {"fastalign/" * name.startswith("kernels/") + name for name in tree.stdout.split()}
wanted = wanted - {"fastalign/kernels"} | {"fastalign/_C.abi3.so"}
held = {name for name in held if ".dist-info/" not in name}
assert held == wanted, f"missing {sorted(wanted - held)}, too many {sorted(held - wanted)}"
PYTHON

"$PYTHON" -m venv "$place/env"
"$place/env/bin/python" -m pip install -q $TORCH "$wheel"
mkdir "$place/empty"
cd "$place/empty"
TRITON_INTERPRET=1 "$place/env/bin/python" - "$place/env" <<'PYTHON'
import sys
import torch
import fastalign as fa

assert fa.__file__.startswith(sys.argv[1]), fa.__file__
torch.manual_seed(0)
hidden, weight, targets = torch.randn(9, 16), torch.randn(50, 16), torch.randint(50, (9,))
results = {}
for name in ("reference", "cpp", "triton"):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with fa.backend(name):
        out = fa.ops.linear_loss(h, w, targets, fa.losses.MLE())
        out.loss.backward()
        logp = fa.ops.linear_logprobs(hidden, weight, targets)
        again = fa.ops.token_logprobs(hidden @ weight.T, targets)
        advantages, returns = fa.ops.gae(logp[None], logp[None])
    results[name] = (out.loss, h.grad, w.grad, logp, again, advantages, returns)
for name in ("cpp", "triton"):
    for got, expected in zip(results[name], results["reference"], strict=True):
        torch.testing.assert_close(got, expected)
chosen, rejected = fa.ops.reward_heads(hidden[:8], weight[:3]).chunk(2)
assert fa.ops.bradley_terry_loss(chosen, rejected) > 0
assert fa.ops.whiten(advantages).mean().abs() < 1e-6
assert (fa.ops.kl_estimate(logp, logp - 1) == 1).all()
print("reference, cpp and triton agree")
PYTHON
"$place/env/bin/fastalign" --help
"$place/env/bin/fastalign" train sft --model scratch:1m --vocab_size 512 --limit 64 --eval_limit 8 \
  --epochs 1 --batch_tokens 2048 --output run
test "$(grep -c '"phase": "train"' run/metrics.jsonl)" -ge 2
test -f run/model/model.safetensors
echo "the wheel works: $wheel"
