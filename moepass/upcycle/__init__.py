"""Upcycling: dense feed-forward blocks become mixtures of experts, exactly where the maths allows it.

``convert`` (exchange the blocks of a live model), ``init`` (weights), ``exactness`` (when step 0 is the dense one).
"""
