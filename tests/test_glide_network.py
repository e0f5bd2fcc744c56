"""The network as a machine: memory, compilation, CUDA graphs, half precision, and inputs that do not fit."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from difflit.glide import Glide, create_glide
from difflit.weights import convert_precision

TOY = {"image_size": 16, "channels": 32, "channel_mult": (1, 2), "residual_blocks": 1, "attention_downsamplings": (2,), "head_channels": 32, "norm_groups": 8,
       "text_width": 64, "text_heads": 2, "text_layers": 2, "text_context": 8, "vocabulary": 40}


def toy(device: str = "cpu", name: str = "tiny", **shape) -> Glide:
    "A minute network with random weights everywhere."
    model = create_glide(name, **{**TOY, **shape}).to(device)
    torch.manual_seed(0)
    for key, p in model.named_parameters():
        nn.init.normal_(p, float(p.dim() == 1 and key.endswith("weight")), 0.1 if p.dim() == 1 else p[0].numel() ** -0.5)
    return model


def inputs(batch: int, device: str = "cpu", side: int = 16) -> dict[str, Tensor]:
    "Images, times and captions."
    generator = torch.Generator().manual_seed(batch)
    given = {
        "x": torch.randn(batch, 3, side, side, generator=generator),
        "timesteps": torch.linspace(10, 990, batch),
        "tokens": torch.randint(0, 40, (batch, 8), generator=generator),
        "mask": torch.arange(8).expand(batch, -1) < 5,
    }
    return {name: value.to(device) for name, value in given.items()}


def kept_bytes(model: nn.Module, given: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    "Bytes that autograd keeps from forward to backward besides the weights, and the gradients."
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)  # of dropout
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**given).square().mean()
    loss.backward()
    return sum(kept.values()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_lowers_memory(autocast: bool) -> None:
    "A flag on the outermost module alone would keep everything. Dropout is on, and gradients are the same bit for bit."
    given, found = inputs(4), []
    for checkpointing in (False, True):
        model = toy(checkpointing=checkpointing, dropout=0.3, residual_blocks=2, position_map=False).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(kept_bytes(model, given))
    (everything, plain), (little, recomputed) = found
    assert little < 0.5 * everything
    assert set(plain) == set(recomputed) and len(plain) == len(list(model.parameters()))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_compiles_without_graph_break_and_at_most_one_recompilation() -> None:
    "Six batch sizes and other times: one graph for the first size, one for all others. Any graph break is an error."
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = toy().eval(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (4, 2, 3, 5, 8, 6):
            given = inputs(batch)
            for shift in (0.0, 3.5):
                given["timesteps"] = given["timesteps"] + shift
                torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_compiled_training_has_the_same_gradients() -> None:
    "Forward and backward through the compiler's autograd; its plain norm against the eager one."
    torch._dynamo.reset()
    model, given = toy(dropout=0.0).train(), inputs(3)
    (model(**given) ** 2).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (torch.compile(model, fullgraph=True, backend="aot_eager")(**given) ** 2).mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_forward_reads_no_values() -> None:
    "On the meta device there are no values: whatever a GPU would have to be waited for raises there."
    with torch.device("meta"):
        model = create_glide("tiny", **TOY, position_map=False)
    given = {name: value.to("meta") for name, value in inputs(3).items()}
    assert model(**given).shape == (3, 3, 16, 16)
    text = model.encode_text(given["tokens"], given["mask"])
    assert model(given["x"], given["timesteps"], text=text).device.type == "meta"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sampling_step_in_a_cuda_graph(dtype: torch.dtype | None) -> None:
    "A forward pass is recorded once and replayed with other images, times and words."
    model, given = toy("cuda").eval(), inputs(4, "cuda")
    with torch.no_grad(), model.prepared(dtype):
        still = {"x": given["x"].clone(), "timesteps": given["timesteps"].clone(), "text": model.encode_text(given["tokens"], given["mask"])}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(**still)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = model(**still)
        for seed in range(3):
            torch.manual_seed(seed)
            x, t = torch.randn_like(still["x"]), torch.rand(4, device="cuda") * 1000
            text = model.encode_text(torch.randint(0, 40, (4, 8), device="cuda"), given["mask"])
            expected = model(x, t, text=text)
            still["x"].copy_(x), still["timesteps"].copy_(t)
            for name in text:
                still["text"][name].copy_(text[name])
            graph.replay()
            torch.testing.assert_close(answer, expected, rtol=1e-2 if dtype else 1e-4, atol=1e-2 if dtype else 1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prepared_on_a_gpu(dtype: torch.dtype) -> None:
    "Prepared, a model on a GPU needs no autocast and answers in fp32."
    model, given = toy("cuda").eval(), inputs(4, "cuda")
    with torch.no_grad():
        expected = model(**given)
        with model.prepared(dtype):
            found = model(**given)
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.03 * expected.norm()


def test_wide_layers_take_the_same_values_by_either_way() -> None:
    "In half precision wide convolutions with few pixels and long attention go ways of their own; forward and gradients agree with fp32 as bf16 does."
    model = toy(image_size=32, channels=64, channel_mult=(1, 4), attention_downsamplings=(1, 2), head_channels=64, dropout=0.0, position_map=False).train()
    given, found = inputs(2, side=32), []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for exact, half in zip(*found):
        assert (half - exact).norm() < 0.04 * exact.norm()


def test_converted_to_half_precision() -> None:
    "Weights as OpenAI stores them, the torso in half precision: no autocast needed, the answer is fp32, preparation changes nothing."
    model, given = toy().eval(), inputs(3)
    with torch.no_grad():
        expected = model(**given)
        convert_precision(model, torch.bfloat16)
        assert model.out[2].weight.dtype == torch.float32 and model.middle_block[0].in_layers[2].weight.dtype == torch.bfloat16
        found = model(**given)
        with model.prepared():
            assert torch.equal(model(**given), found)
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.03 * expected.norm()
    model.train()(**given).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_prepared_restores_the_model_after_an_error() -> None:
    "Whatever happens in the block, layers compute with their own weights afterwards; blocks may be nested."
    model, given = toy().eval(), inputs(3)
    with torch.no_grad():
        expected = model(**given)
        with pytest.raises(RuntimeError, match="interrupted"), model.prepared(torch.bfloat16):
            raise RuntimeError("interrupted")
        assert torch.equal(model(**given), expected)
        with model.prepared(torch.bfloat16):
            half = model(**given)
            with model.prepared():
                torch.testing.assert_close(model(**given), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(model(**given), half)
        for p in model.parameters():
            p.mul_(0.9)
        assert (model(**given) - expected).abs().max() > 1e-3


BAD = {
    "images": ({"x": torch.zeros(2, 3, 15, 16)}, r"divisible by 2, not \[2, 3, 15, 16\]"),
    "channels": ({"x": torch.zeros(2, 1, 16, 16)}, r"\[B, 3, H, W\]"),
    "times": ({"timesteps": torch.zeros(3)}, r"timesteps has the shape \[3\]; 2 images need \[2\]"),
    "captions": ({"tokens": torch.zeros(3, 8).long(), "mask": torch.ones(3, 8).bool()}, "3 captions came with 2 images"),
    "mask": ({"mask": None}, "tokens came without a mask"),
    "mask shape": ({"mask": torch.ones(2, 7).bool()}, r"tokens \[2, 8\] and mask \[2, 7\]"),
    "vocabulary": ({"tokens": torch.tensor([[0] * 8, [0, 0, 40, 0, 0, 0, 0, 0]])}, "token 40 of caption 1, at place 2, is outside of .* vocabulary, 0…39"),
    "negative": ({"tokens": torch.full((2, 8), -1)}, "token -1 of caption 0, at place 0"),
    "low_res": ({"low_res": torch.zeros(2, 3, 4, 4)}, "super_resolution is off"),
    "inpaint_mask": ({"inpaint_mask": torch.zeros(2, 1, 16, 16)}, "does not inpaint"),
    "text": ({"text": {"sequence": torch.zeros(2, 64, 8)}}, "with 'pooled' and 'sequence'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_named_errors(case: str) -> None:
    "What does not fit is named at the door."
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        toy()(**{**inputs(2), **changed})


SPECIAL = {
    "low_res channels": ({"low_res": torch.zeros(2, 1, 4, 4)}, r"low_res has the shape \[2, 1, 4, 4\].*\[2, 3, any, any\]"),
    "low_res rows": ({"low_res": torch.zeros(1, 3, 4, 4)}, r"low_res has the shape \[1, 3, 4, 4\]"),
    "low_res missing": ({"low_res": None}, "needs low_res"),
    "mask size": ({"inpaint_mask": torch.zeros(2, 1, 8, 8)}, r"inpaint_mask has the shape \[2, 1, 8, 8\]"),
    "mask channels": ({"inpaint_mask": torch.zeros(2, 3, 16, 16)}, r"inpaint_mask has the shape \[2, 3, 16, 16\]"),
    "picture size": ({"inpaint_image": torch.zeros(2, 3, 16, 8)}, r"inpaint_image has the shape \[2, 3, 16, 8\]"),
}


@pytest.mark.parametrize("case", list(SPECIAL))
def test_named_errors_of_upsampling_and_inpainting(case: str) -> None:
    "The further inputs of the variants."
    changed, message = SPECIAL[case]
    model = toy(super_resolution=True, inpaint=True, position_map=False)
    given = {**inputs(2), "low_res": torch.zeros(2, 3, 4, 4), "inpaint_image": torch.zeros(2, 3, 16, 16), "inpaint_mask": torch.zeros(2, 1, 16, 16)}
    model(**given)
    with pytest.raises(ValueError, match=message):
        model(**{**given, **changed})


def test_position_map_names_its_size() -> None:
    "A model that knows its places cannot see another size."
    with pytest.raises(ValueError, match="a map of its 16 × 16 pixels; it cannot see 32 × 32"):
        toy(position_map=True)(**inputs(2, side=32))


def test_captions_of_another_length() -> None:
    "128 tokens, most of them padding, are read as if they had come in the model's own length; lost words are announced once."
    model, given = toy().eval(), inputs(2)
    padded = {**given, "tokens": nn.functional.pad(given["tokens"], (0, 120)), "mask": nn.functional.pad(given["mask"], (0, 120))}
    short = {**given, "tokens": given["tokens"][:, :5], "mask": given["mask"][:, :5]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(**given)
        for other in (padded, short):
            torch.testing.assert_close(model(**other), expected)
    with pytest.warns(UserWarning, match="captions of 19 tokens were cut to text_context=8"):
        model.encode_text(torch.zeros(1, 19).long(), torch.ones(1, 19).bool())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_text(torch.zeros(1, 19).long(), torch.ones(1, 19).bool())
