"""DIL in a training loop of one's own: `python examples/pytorch_loop.py [--model NAME]`."""

from __future__ import annotations

import copy

import torch
from shared import batches, load_model, parse_options, tokenized_pairs

from dil_kernels import fused_dil_loss


def main(argv: list[str] | None = None) -> None:
    """Train on the embedded pairs, with a frozen copy of the model as the reference."""
    options = parse_options(__doc__, argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model)
    policy = model.to(device)
    ref = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.learning_rate)

    for step, batch in enumerate(batches(tokenized_pairs(tokenizer), tokenizer, options.batch_size, options.steps)):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ref_logits = ref(**inputs).logits
        out = fused_dil_loss(
            policy(**inputs).logits,
            batch["labels"].to(device),
            ref_logits=ref_logits,
            loss_type="lsif",
            inplace_backward=True,  # nobody else needs the logits
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == options.steps - 1:
            margin = (out.chosen_rewards - out.rejected_rewards).mean()
            print(f"step {step}  loss {out.loss.item():.4f}  margin {margin.item():.4f}")


if __name__ == "__main__":
    main()
