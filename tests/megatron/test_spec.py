"""Layer specs: classes are replaced wherever they stand, names on disk are those of Transformer Engine's spec."""

from __future__ import annotations

from functools import partial

from swiftlite.megatron import backend
from swiftlite.megatron.model.spec import disk_names, substitute


def test_disk_names_differ_by_kind_of_layer() -> None:
    assert disk_names(is_moe=False, is_mla=False) == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    assert "pre_mlp_layernorm." not in disk_names(is_moe=True, is_mla=False)
    assert "input_layernorm." not in disk_names(is_moe=False, is_mla=True)


def test_substitute_reaches_every_form_of_a_spec() -> None:
    backend.setup()
    from megatron.core.transformer.spec_utils import ModuleSpec

    class Old:
        pass

    class New:
        pass

    spec = ModuleSpec(module=Old, submodules=ModuleSpec(module=int, params={"kept": Old}), params={})
    changed = substitute([spec, partial(Old, part=Old)], {Old: New})
    assert changed[0].module is New
    assert changed[0].submodules.module is int
    assert spec.module is Old, "the original stays"
    assert changed[1].func is New
    assert changed[1].keywords == {"part": New}
