"""moepass's own checkpoint format, for converted models that no architecture of transformers can hold.

A folder holds
    config.json                     ``{"model_type": "moepass", "dense_config": {...}}``: the dense config inside
    moepass.json                    schema version, and for every MoE block its spec and where it came from (``schema``)
    moepass.safetensors             the state dict of the converted model, by its names in memory, tied tensors once; or
                                    moepass-00001-of-N.safetensors and moepass.safetensors.index.json
    tokenizer, generation settings  as they are
Why these names: with the dense config.json in its place, ``from_pretrained`` would build the dense model, draw the
missing feed-forward weights at random and only print a table.  With an unknown ``model_type`` every Auto class refuses;
with weights under another name so does ``LlamaForCausalLM.from_pretrained``, which only warns of a foreign
``model_type``.
No pickle anywhere.

``schema``   moepass.json          ``skeleton``  config and manifest -> the model on meta, blocks in place
``load``     folder -> model       ``save``      converted model -> folder
``plan``     dense folder -> tensors to write (``moepass upcycle --to moepass``)
"""
