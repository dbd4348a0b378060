"""The memory on other models of Transformers: attached in front of their layers, saved, loaded, detached.

| file | holds |
|---|---|
| `attach.py` | `attach_memory`, `detach_memory`: finds the layers, puts the memories in, ties them to the model |
| `layer.py` | a layer of the host with a memory in front of it |
| `pass_of_host.py` | what the memories of one pass of the host share: letters, segments, padding, state |
| `token_letters.py` | which bases the tokens of a tokenizer spell: one each, k-mers or byte pairs |
| `state_in_cache.py` | what is remembered while decoding: kept with the host's cache, and treated as it is |
| `saved_memory.py` | `save_memory`, `load_memory` |
"""
