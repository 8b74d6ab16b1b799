r"""The mapping engine: which bytes of a Hugging Face checkpoint are which of a Megatron-core one, and how they move.

Every rule is a gather of rows, so one table serves offline conversion both ways, live load and save of shards, LoRA and
verification. Needs torch for dtypes and casts only: no transformers, no megatron, no process group.

    Hugging Face tensors                entry                     slot
    q_proj  +--------+     segments     +--------+                key[index]: layer 3 of [L, rows, columns]
            |aaa     | --------------\  |aaa     |                +--------+
            |ddd     | -----------\   `>|bbb     |  slot_of(entry)|        | layer 2
    k_proj  +--------+   segments  \    |ccc     | -------------> |abcdef  | layer 3 = one chunk, one record of a file
            |bbb     | ------------ \-->|ddd     |                |        | layer 4
            |eee     |               ...|eee     |                +--------+
    v_proj  ...                         +--------+   a rank's part of it is a shard

    entry    one Megatron tensor, or one expert's slice of it, and the HF tensors that it is made of (rule.py)
    segment  consecutive rows of one of them; an entry is a list of segments, its inverse another (ops.py)
    slot     where a torch_dist checkpoint keeps an entry: a key, and an index into its leading [L] and [E] (torch_dist.py)
    chunk    a part of a key's tensor that is stored in one piece, as a record of a file (dcp_file.py, torch_record.py)
    shard    the rectangle of an entry that one rank holds (shard.py)
    extent   bytes of a file: what all of these come down to when they are read (storage.py)
    block    as many rows of an output tensor as are in memory at once while it is written (stream.py)
"""
