#!/bin/sh
# gpu_notice.sh VENV
# Says loudly that an NVIDIA GPU is here and that this JAX cannot use it. Silent otherwise.
venv=$1

[ "${JAX_PLATFORMS:-}" = cpu ] && exit 0
nvidia-smi -L >/dev/null 2>&1 || [ -e "${NVIDIA_DEVICE:-/dev/nvidia0}" ] || exit 0
for plugin in "$venv"/lib/python3*/site-packages/jax_cuda*_plugin; do
  [ -e "$plugin" ] && exit 0
done
cat >&2 <<'END'
********************************************************************************
*  AN NVIDIA GPU IS HERE, AND THIS TRAINING WILL NOT USE IT: JAX is installed   *
*  for CPU. Stop (Ctrl-C) and start again with                                  *
*      make pretrain EXTRA=cuda                                                 *
*  or say that the CPU is meant: JAX_PLATFORMS=cpu make pretrain                *
********************************************************************************
END
