"""Peak speed of devices, and the share of it that a training achieves: model FLOP utilization (MFU).

The peaks are those of dense matrix products on tensor cores without sparsity, from NVIDIA's data sheets, which print
twice as much for "with sparsity". MFU counts the operations of the model only: three forward passes per image, whether
or not activations are computed again.

Only bfloat16 has peaks here. In float32, convolutions may use TF32 while matrix products do not, so that there is no
single peak.
"""

import torch

# Name of the device -> precision -> floating-point operations per second.
PEAK_FLOPS = {
    # data sheet of the A100: BFLOAT16 312 TFLOPS, for SXM and PCIe
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312e12},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12},
    "NVIDIA A100-PCIE-40GB": {"bfloat16": 312e12},
    "NVIDIA A100 80GB PCIe": {"bfloat16": 312e12},
    # data sheets of the H100: 1,979 TFLOPS with sparsity for SXM, 1,513 for PCIe, 1,671 for NVL
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.5e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756.5e12},
    "NVIDIA H100 NVL": {"bfloat16": 835.5e12},
    # data sheet of the H200: 1,979 TFLOPS with sparsity for SXM, 1,671 for NVL
    "NVIDIA H200": {"bfloat16": 989.5e12},
    "NVIDIA H200 NVL": {"bfloat16": 835.5e12},
    # data sheet of the L40S: 362.05 TFLOPS, and 733 with sparsity
    "NVIDIA L40S": {"bfloat16": 362.05e12},
}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU; "" for another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def model_flops_metrics(
    flops_per_image: float, images_per_second: float, devices: float, name: str, precision: str
) -> dict[str, float]:
    """Return the operations per second of a training on all devices, and their share of the peak if that is known.

    `flops_per_image` are those of a forward pass, 0 if unknown; a backward pass takes twice as many. `name` is the name
    of every device.
    """
    if not flops_per_image:
        return {}
    flops = 3 * flops_per_image * images_per_second
    metrics = {"model_tflops_per_second": flops / 1e12}
    if peak := PEAK_FLOPS.get(name, {}).get(precision):
        metrics["model_flops_utilization"] = flops / (devices * peak)
    return metrics
