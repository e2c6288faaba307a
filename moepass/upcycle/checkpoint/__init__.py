"""Streaming I/O of Hugging Face checkpoints: read headers, plan shards, write them one tensor at a time, compare.

``tensors``                        the vocabulary: ``Header``, ``OutTensor``, ``Verbatim``, ``Computed``, ``Streamed``
``source``, ``headers``            open SRC and check it
``shards``                         plan DST: tensor -> file -> byte
``writer``, ``recipes``, ``copying``, ``destination``, ``journal``   write DST, resume
``verify``, ``stock``, ``routing``    is DST the same function as SRC, layer by layer
"""
