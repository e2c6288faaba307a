"""The parts of ``benchmarks.cpu_moe``: its blocks, its sides, its clock, what the numbers say, and the chart."""
