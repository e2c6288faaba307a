"""Hugging Face folder to Hugging Face folder: which dense model becomes which MoE of transformers, and how.

``families`` (dense side: features of a config), ``hosts`` (MoE side: what each supports, fields, names), ``match`` (may
this pair meet?), ``config`` (the output's config), ``recipe`` (methods, scales, verdict), ``tensors`` (what to write),
``sizes`` (parameters, FLOPs), ``card`` (report and model card).
"""
