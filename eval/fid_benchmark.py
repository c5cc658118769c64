"""Compute FID and related metrics of IPT-V2 and DiT pipelines: `iptv2-fid` as a script.

accelerate launch eval/fid_benchmark.py --config configs/benchmark/emoji64.yaml
"""

from iptv2_diffusion.commands.fid import BenchmarkConfig, main, run

__all__ = ["BenchmarkConfig", "main"]

if __name__ == "__main__":
    run()
