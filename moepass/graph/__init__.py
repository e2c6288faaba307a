"""The graph side of the compiler: capture, recognise, rewrite.

``capture`` owns a copy of Dynamo's graph; ``vocabulary``, ``dataflow`` and ``program`` read it; ``dense`` and
``semantic`` recognise sites; ``rewrite`` puts router and experts in a dense site's place.
"""
