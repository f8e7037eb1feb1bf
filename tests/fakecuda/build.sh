#!/bin/sh
# Builds the fake libraries into build/ from src/ and the CUDA packages beside an installed torch.
#     ./build.sh PYTHON      the interpreter of an environment with torch's CUDA build (make fake-cuda makes one)
# Wants gcc and binutils; the headers are those of the CUDA wheels, or of CUDA_HOME. Takes a few seconds.
set -e
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python}
out=${FAKE_CUDA_BUILD:-$here/build}
refuse() { echo "build.sh: $*" >&2; exit 2; }

for tool in gcc readelf nm; do
    command -v "$tool" >/dev/null || refuse "expected $tool (Debian: apt-get install gcc binutils), found none"
done
found=$("$python" - 2>/dev/null <<'PYTHON'
import sysconfig
from importlib.metadata import version
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
words = (line.partition(" = ") for line in (site / "torch" / "version.py").read_text().splitlines())
cuda = next((value.strip("'") for name, _, value in words if name.startswith("cuda")), "None")
print(site, version("torch").partition("+")[0], cuda)
PYTHON
) || refuse "expected an interpreter with torch's CUDA build, found $python"
set -- $found
site=$1 torch=$2 cuda_version=$3
# The symbols that torch calls, and the order in which it does, are of a release: these were looked through.
case "$torch:$cuda_version" in
    2.1[1-4].*:13.*) ;;
    *:None) refuse "expected torch's CUDA build, found torch $torch for the CPU alone in $site" ;;
    *) refuse "expected torch 2.11 to 2.14 for CUDA 13, found torch $torch for CUDA $cuda_version" ;;
esac
include=$site/nvidia/cu13/include
[ -f "$include/crt/host_defines.h" ] || [ ! -d "${CUDA_HOME:-/usr/local/cuda}/include" ] || include=${CUDA_HOME:-/usr/local/cuda}/include
for header in cuda.h cuda_runtime_api.h crt/host_defines.h nv/target cublas_v2.h cufft.h; do
    [ -f "$include/$header" ] || refuse "expected the header $header in the CUDA wheels or in CUDA_HOME, found none" \
        "in $include: $python -m pip install nvidia-cuda-crt==$cuda_version.* nvidia-cuda-cccl==$cuda_version.*"
done

rm -rf "$out"
mkdir -p "$out/tmp"
# gcc's own warnings on; the vendors' headers are "system" ones
flags="-std=gnu11 -O2 -g -fPIC -Wall -Wextra -Wno-unused-parameter -fvisibility=default -I$out/tmp -I$here/src
 -isystem $include -idirafter $site/nvidia/cudnn/include"

grep -oE '^ *cuda(Success|Error[A-Za-z0-9]+) *= *[0-9]+' "$include/driver_types.h" |
    sed -E 's/^ *(cuda[A-Za-z0-9]+) *= *([0-9]+)/{\2, "\1", 0},/' > "$out/tmp/errors.inc"

# library NAME SOURCE-or-"" REAL-or-"" ANSWER [more options for stubs.py]
library() {
    name=$1 source=$2 real=$3 answer=$4
    shift 4
    work="$out/tmp/$name"
    written=""
    if [ -n "$source" ]; then
        gcc $flags -c "$here/src/$source" -o "$work.o"
        written="--written $work.o"
    fi
    if [ -n "$real" ]; then set -- --real "$site/nvidia/$real" "$@"; fi
    "$python" "$here/src/stubs.py" "$name" $written --answer "$answer" --to "$work" "$@"
    gcc $flags -fno-builtin -w -c "$work.c" -o "$work.stubs.o"
    link=""
    [ "$name" = libcudart.so.13 ] || link="-L$out -l:libcudart.so.13 -Wl,-rpath,\$ORIGIN"
    gcc -shared -Wl,-soname,"$name" -Wl,--version-script="$work.map" -o "$out/$name" \
        $( [ -n "$source" ] && echo "$work.o" ) "$work.stubs.o" $link -lpthread -ldl
}

products='cublas([SDCZ]|I[sdcz]|[A-Z][a-z]*Ex|Gemm|Dot|Scal|Axpy|Nrm2|Rot|Hgemm|Set(Vector|Matrix)|Get(Vector|Matrix)).*'
library libcudart.so.13 cudart.c cu13/lib/libcudart.so.13 801
library libcuda.so.1 cuda.c "" 801 --header "$include/cuda.h" 'CUDAAPI +(cu[A-Z]\w+)\('
library libnvidia-ml.so.1 nvml.c "" 3 --header "$here/src/nvml.c" '(nvml[A-Z]\w+)\('
library libcublas.so.13 cublas.c cu13/lib/libcublas.so.13 15 --launch "$products"
library libcublasLt.so.13 cublaslt.c cu13/lib/libcublasLt.so.13 15 \
    --succeed '.*(SetAttribute|_init_internal|AlgoInit|Init_internal)'
library libcudnn.so.9 cudnn.c cudnn/lib/libcudnn.so.9 3000 --succeed 'cudnnSet.*|cudnnDestroy.*'
library libcusparse.so.12 handles_cusparse.c cu13/lib/libcusparse.so.12 10 --succeed 'cusparseDestroy.*|cusparseSet.*'
library libcusolver.so.12 handles_cusolver.c cu13/lib/libcusolver.so.12 16 --succeed 'cusolver(Dn|Sp)?(Destroy|Set).*'
library libcufft.so.12 handles_cufft.c cu13/lib/libcufft.so.12 16
library libcupti.so.13 "" cu13/lib/libcupti.so.13 15
rm -rf "$out/tmp"
echo "fake CUDA for torch $torch in $out"
