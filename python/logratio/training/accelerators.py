"""GPUs: their figures in data sheets, and the shares of them that training reaches.

Figures are per GPU: bfloat16 products without sparsity, memory, and bandwidth in one direction
(data sheets of NVLink and PCIe add both directions).

- B200: NVIDIA DGX B200 data sheet (72 PFLOP/s dense FP8 and 1,440 GB for 8 GPUs; NVLink 5).
- H100, H100 PCIe, H200: NVIDIA H100 and H200 data sheets (1,979 TFLOP/s with sparsity, half of it
  without; NVLink 4: 900 GB/s both ways; PCIe 5 x16: 128 GB/s both ways).
- A100: NVIDIA A100 80 GB data sheet, SXM (NVLink 3: 600 GB/s both ways).
- L40S, L4, A40, A10: their NVIDIA data sheets; no NVLink: PCIe 4 x16, 64 GB/s both ways.
- Networks: one 400 Gb/s adapter per GPU in the DGX H100, H200 and B200 user guides, 200 Gb/s in
  that of the DGX A100. The others have no reference design: 100 Gb/s is an assumption. Clouds
  differ, so the network is a setting of a cluster.

Memory is the data sheet's number of 10⁹ bytes. Drivers report up to 7 % more, which is left to the
CUDA context and the buffers of NCCL.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """The shares of the data sheet's figures that training reaches.

    Attributes:
        compute: Of the products. 0.43 is the largest share reported for Llama 3 on H100s (arXiv
            2407.21783, table 4: 38 to 43 %), whole updates of dense models.
        memory: Of the memory's bandwidth, by passes over all weights. An assumption; copies reach
            0.8 to 0.9.
        link: Of NVLink or PCIe, by collectives: 300 of 450 GB/s. An assumption, to be measured with
            nccl-tests.
        network: Of the adapters, by collectives: 40 of 50 GB/s. An assumption, as above.
    """

    compute: float = 0.43
    memory: float = 0.75
    link: float = 2 / 3
    network: float = 0.8


@dataclass(frozen=True)
class Accelerator:
    """What computes one rank of a run, and how it is connected.

    Attributes:
        name: Name for people, which contains the name that torch reports.
        flops: Products in bfloat16 without sparsity, FLOPs per second.
        memory: Bytes.
        memory_bandwidth: Bytes per second.
        link: Bytes per second to and from the other GPUs of its host, in one direction.
        network: Bytes per second to and from other hosts, in one direction.
        host_bus: Bytes per second to and from the host's memory, in one direction.
        shares: The shares of these figures that training reaches.
        launch: Seconds that a collective takes without data. An assumption for GPUs.
        hop: Further seconds per host that a collective passes. An assumption for GPUs.
        reduction: Time to reduce a byte, relative to gathering it.
        overlaps: Whether collectives run while the device computes.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    host_bus: float = 32e9
    shares: Shares = Shares()
    launch: float = 20e-6
    hop: float = 5e-6
    reduction: float = 1.0
    overlaps: bool = True

    @property
    def speed(self) -> float:
        """FLOPs per second that training reaches."""
        return self.flops * self.shares.compute


def _gpu(
    name: str,
    tera_flops: float,
    gigabytes: float,
    bandwidth: float,
    link: float,
    network: float,
    bus: float = 32,
) -> Accelerator:
    """Return a GPU; bandwidths in GB per second."""
    return Accelerator(
        name,
        tera_flops * 1e12,
        gigabytes * 1e9,
        bandwidth * 1e9,
        link * 1e9,
        network * 1e9,
        bus * 1e9,
    )


GPUS: Mapping[str, Accelerator] = {
    "b200": _gpu("B200", 2250, 180, 8000, 900, 50, 64),
    "h100-pcie": _gpu("H100 PCIe", 756, 80, 2000, 64, 50, 64),
    "h200": _gpu("H200", 989.4, 141, 4800, 450, 50, 64),
    "h100": _gpu("H100", 989.4, 80, 3350, 450, 50, 64),
    "a100": _gpu("A100", 312, 80, 2039, 300, 25),
    "l40s": _gpu("L40S", 362, 48, 864, 32, 12.5),
    "l4": _gpu("L4", 121, 24, 300, 32, 12.5),
    "a40": _gpu("A40", 149.7, 48, 696, 32, 12.5),
    "a10": _gpu("A10", 125, 24, 600, 32, 12.5),
}
"""GPUs by the name that `--gpu` takes; see the module for the sources. The order matters: see
`known_gpu`."""


def known_gpu(name: str) -> Accelerator | None:
    """Return the GPU for the name that torch reports: the first whose name is part of it."""
    return next((gpu for gpu in GPUS.values() if gpu.name in name), None)
