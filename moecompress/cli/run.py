"""moecompress run: generate text with a (compressed) model."""

from __future__ import annotations

from typing import Annotated

import typer

from moecompress.cli.common import Json, LoadBits, Model, Trust, print_json


def command(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 picks the most likely token every time.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    load_bits: LoadBits = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Generate text, streaming it to the terminal.

    Examples:

        moecompress run out --prompt "The capital of France is"

        moecompress run out --chat --prompt "Why is the sky blue?" -n 200 --temperature 0.7
    """
    import time

    from moecompress.model.checkpoint import Checkpoint, resolve
    from moecompress.model.skeleton import load_tokenizer
    from moecompress.progress import say
    from moecompress.runtime.loading import load

    folder = resolve(model)
    Checkpoint(folder)  # reads every header: transformers would trip over a damaged one with words of its own
    tokenizer = load_tokenizer(folder, trust_remote_code)
    loaded = load(folder, trust_remote_code=trust_remote_code, load_bits=load_bits)

    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    streamer = None if json_ else TextStreamer(tokenizer, skip_special_tokens=True)
    start = time.perf_counter()
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        output = loaded.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, streamer=streamer,
                                 max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)  # fmt: skip
    seconds = time.perf_counter() - start
    new = output[0, inputs.input_ids.shape[1] :]
    if json_:
        print_json(
            {
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "tokens": len(new),
                "tokens_per_second": len(new) / seconds,
            }
        )
    else:
        say(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s")
