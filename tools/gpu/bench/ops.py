"""The ops of the engine's list (tests/common/speed.rs) by PyTorch: cuBLASLt, cuDNN and the fused attentions, each library at its best layout."""

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from peer import DTYPES, Call, Peer

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "None": lambda x: x,
    "Geglu": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
    "QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def calls(shape: dict, device: torch.device, dtype: str) -> dict[str, Call]:
    """The ways in which PyTorch does an op, by name. Its numbers are of the same scale as the engine's."""
    noise = lambda *sizes: torch.rand(sizes, device=device, dtype=torch.float32).sub(0.5).to(DTYPES[dtype])  # noqa: E731
    last = lambda x: x.contiguous(memory_format=torch.channels_last)  # noqa: E731
    match shape:
        case {"op": "gemm", "rows": rows, "k": k, "n": n, "activation": activation}:
            x, w, bias, act = noise(rows, k), noise(n, k), noise(n), ACTIVATIONS[activation]
            ways = {"linear": lambda: act(F.linear(x, w, bias))}
            return ways if activation == "None" else {"linear, then activation": ways["linear"], "linear alone": lambda: F.linear(x, w, bias)}
        case {"op": "gemm_to_input", "rows": rows, "k": k, "n": n}:
            d_y, w = noise(rows, n), noise(n, k)
            return {"mm": lambda: d_y @ w}
        case {"op": "gemm_to_weight", "rows": rows, "k": k, "n": n}:
            x, d_y = noise(rows, k), noise(rows, n)
            return {"mm": lambda: x.t() @ d_y}
        case {"op": "conv" | "conv_to_input" as op, "batch": b, "size": size, "inputs": i, "outputs": o, "kernel": kernel, "stride": stride}:
            x, w, bias, padding = noise(b, i, size, size), noise(o, i, kernel, kernel), noise(o), kernel // 2
            if op == "conv":
                return {
                    "cuDNN, channels last": lambda x=last(x), w=last(w): F.conv2d(x, w, bias, stride, padding),
                    "cuDNN, channels first": lambda: F.conv2d(x, w, bias, stride, padding),
                }
            d_y = last(F.conv2d(x, w, bias, stride, padding))
            return {"cuDNN, channels last": lambda w=last(w): torch.nn.grad.conv2d_input(x.shape, w, d_y, stride, padding)}
        case {"op": "attention", "batch": b, "queries": queries, "keys": keys, "heads": heads, "head_dim": dim}:
            q, k, v = (noise(b, t, heads, dim).transpose(1, 2) for t in (queries, keys, keys))
            return {name: attention(q, k, v, backends) for name, backends in BACKENDS.items()}
        case {"op": "group_norm", "batch": b, "pixels": pixels, "channels": c}:
            x, weight, bias = noise(b, c, math.isqrt(pixels), math.isqrt(pixels)), noise(c), noise(c)
            norm = lambda x: F.silu(F.group_norm(x, 32, weight, bias, 1e-5))  # noqa: E731
            return {"channels first": lambda: norm(x), "channels last": lambda x=last(x): norm(x)}
    raise ValueError(f"no such op in PyTorch's list: {shape}")


BACKENDS = {
    "FlashAttention": [SDPBackend.FLASH_ATTENTION],
    "cuDNN": [SDPBackend.CUDNN_ATTENTION],
    "SDPA without cuDNN": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backends: list[SDPBackend]) -> Call:
    def call():
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def recorded(peer: Peer, call: Call, together: int) -> Callable[[int], float]:
    """Milliseconds of a CUDA graph of so many calls: what starting them takes is not measured. On the CPU of one call."""
    if peer.device.type != "cuda":
        call()
        return peer.timed(call)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call()
    peer.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        for _ in range(together):
            call()
    graph.replay()
    return peer.timed(graph.replay)


def runners(peer: Peer, shape: dict, dtype: str, together: int) -> tuple[dict[str, Callable[[int], float]], dict[str, str]]:
    """What can be timed, and why the rest cannot: no library does every shape."""
    found, refused = {}, {}
    for name, call in calls(shape, peer.device, dtype).items():
        try:
            found[name] = recorded(peer, call, together)
        except (RuntimeError, ValueError) as error:
            refused[name] = str(error).strip().splitlines()[0][:120]
            with contextlib.suppress(RuntimeError):
                peer.wait()
    return found, refused


def ceilings(peer: Peer, dtype: str) -> dict[str, float]:
    """Medians of what the machine does at best: copied bytes per second, read and written both counted, and operations per second of a large
    product of random numbers."""
    # A CPU would take minutes.
    size, count = (8192, 2**31) if peer.device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(size, size, device=peer.device, dtype=DTYPES[dtype]) for _ in range(2))
    source = torch.randint(0, 255, (count,), device=peer.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product, copy = peer.timed(lambda: a @ b), peer.timed(lambda: target.copy_(source))
    median = lambda run: sorted(run(5) for _ in range(7))[3]  # noqa: E731
    product(3), copy(3)
    return {"flops_per_s": 2e3 * size**3 / median(product), "bytes_per_s": 2e3 * count / median(copy), "product": size, "copied": count}
