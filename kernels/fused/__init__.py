"""The ``fused`` kernels: an MoE block in a handful of Triton launches, forward and backward.

``schedule``  shape -> tiles -> launches, pure data without Triton; the launcher, the emitter and the ahead-of-time
              checker read the same values, so that what is run is what is shown (``select``: streams or tiles)
``ops``       ``torch.library`` ops that allocate the buffers and run the launches
the rest      the kernels, one family a file: ``routing``, ``up``, ``down``, ``combine``, ``backward``, ``weights``,
              ``decode``; ``blocks`` holds what they share.  Importing one of them imports Triton.
"""
