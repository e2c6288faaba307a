"""Parts of ``benchmarks.gpu_moe``: what is measured, beside whom, how it is timed, checked and drawn."""
