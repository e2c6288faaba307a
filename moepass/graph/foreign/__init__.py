"""Recognising mixture-of-experts blocks that other code spelled out: Hugging Face, torchtitan, OLMo-core, Megatron.

``facts``      what an FX node may be known to hold, as a function of (token, choice) pairs
``walk``       one pass over a graph in execution order, in-place changes included, that gives every node its fact
``routing``    transfer rules of the bookkeeping: sorts, histograms, offsets, gathers and their inverses
``compute``    transfer rules of the arithmetic: expert GEMMs, biases, the pointwise program, routing weights, the sum
``dense_form`` transfer rules of the form that runs every expert on every token (Llama-4)
``traces``     what eager loops over experts leave in the graphs around their breaks
``site``       the values: ``ForeignExperts``, or ``Rejected`` with a reason code
``find``       the graph's sites and near misses
``emit``       the same computation by ``moepass::experts``

Nothing is recognised by name, class or source file: a site is a proof that a node equals
``sum_k weight[t,k] * expert_{index[t,k]}(x_t)``, and a step that is not proven is a refusal with a reason.
"""
