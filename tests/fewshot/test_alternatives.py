"""LoRA+, EVA, rising ranks and LoRA on the values of the image tower, as methods of the few-shot program."""

import dataclasses

import fewshot_standin as standin
import pytest
import torch
from torch import nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.fewshot.config import Run, check
from complora_kernels.fewshot.datasets import choose_split
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.recipe import train
from complora_kernels.fewshot.team import ALONE
from complora_kernels.fewshot.training import RunContext, adapted_model

ALTERNATIVES = ("lora-plus", "eva", "prilora", "image-lora")


def adapted(method, folder, **options):
    setting = standin.setting()
    split = choose_split(setting.new.dataset, 2, 0)
    config = standin.config(folder, **options)
    context = RunContext(config, Run(method, 2, 1e-2, 0), setting, split, "", folder, torch.float32, ALONE)
    return adapted_model(context)


def ranks(model):
    layers = adapted_layers(model)
    return {layer.weight_name(name): len(layer.factors(name)[0]) for layer in layers.values() for name in layer.weights}


@pytest.mark.parametrize("method", ALTERNATIVES)
def test_a_run_learns_and_goes_on_where_it_was_stopped(tmp_path, method):
    def stop(step, _):
        if step == 23:
            raise KeyboardInterrupt

    setting, run = standin.setting(), Run(method, 2, 1e-3 if method == "lora-plus" else 3e-2, 0)
    config = standin.config(tmp_path, steps=40, log_every=1, r=4)
    whole = train(config, run, setting, tmp_path / "whole")
    losses = [line["loss"] for line in read_json_lines(tmp_path / "whole" / "log.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    assert whole["new"] > whole["zero_shot_new"]
    with pytest.raises(KeyboardInterrupt):
        train(config, run, setting, tmp_path / "parts", stop)
    parts = train(config, run, setting, tmp_path / "parts")
    assert {k: v for k, v in parts.items() if k not in standin.VARYING} == {
        k: v for k, v in whole.items() if k not in standin.VARYING
    }


def test_eva_keeps_the_mean_rank_and_reads_the_shots(tmp_path):
    model = adapted("eva", tmp_path, r=4)
    found = ranks(model)
    assert sum(found.values()) == 4 * len(found)
    for layer in adapted_layers(model).values():
        for name in layer.weights:
            A, B = layer.factors(name)
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)  # rows of a float64 basis
            assert B.count_nonzero() == 0


def test_ranks_rise(tmp_path):
    found = ranks(adapted("prilora", tmp_path, r=4))
    assert {found[name] for name in found if "visual.transformer.resblocks.0." in name} == {2}
    assert {found[name] for name in found if "visual.transformer.resblocks.1." in name} == {6}


def test_image_lora_adapts_the_values_of_the_image_tower(tmp_path):
    found = ranks(adapted("image-lora", tmp_path))
    assert set(found) == {f"visual.transformer.resblocks.{i}.attn.v_proj" for i in range(2)}


def test_lora_plus_is_a_b_that_learns_faster(tmp_path):
    """Steps of AdamW at two rates, without decay and with an epsilon of nothing, against the strength alone."""
    torch.manual_seed(0)
    base = nn.Linear(12, 9).double().requires_grad_(False)
    x, y = torch.randn(20, 12).double(), torch.randn(20, 9).double()
    plain = standin.config(tmp_path).adapter("lora", 0)
    plus = standin.config(tmp_path, loraplus_lr_ratio=8.0).adapter("lora-plus", 0)
    assert plus == dataclasses.replace(plain, lora_alpha=8 * plain.lora_alpha)

    def trained(adapter, ratio):
        torch.manual_seed(1)
        layer = ck.CompLoRALinear.from_linear(base, adapter)
        A, B = layer.factors("")
        groups = [{"params": [A], "lr": 1e-2}, {"params": [B], "lr": 1e-2 * ratio}]
        optimizer = torch.optim.AdamW(groups, eps=1e-30, weight_decay=0.0)
        for _ in range(10):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        return layer.get_delta_weight("")

    torch.testing.assert_close(trained(plus, 1), trained(plain, 8), rtol=1e-9, atol=1e-12)
    assert (trained(plain, 1) - trained(plain, 8)).abs().max() > 1e-3


def test_a_ratio_that_cannot_work(tmp_path):
    with pytest.raises(ValueError, match=r"--loraplus-lr-ratio 0.0: expected more than 0"):
        check(standin.config(tmp_path, loraplus_lr_ratio=0.0))
