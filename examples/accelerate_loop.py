"""DIL with Accelerate: `accelerate launch examples/accelerate_loop.py [--model NAME]`, or plain `python`.

The reference is needed once: its summed log-probs are computed before training, and no second model stays in memory.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from shared import load_model, parse_options, tokenized_pairs
from torch.utils.data import DataLoader

from dil_kernels import fused_dil_loss, sequence_logps
from dil_kernels.data import PreferenceCollator


def main(argv: list[str] | None = None) -> None:
    """Train on the embedded pairs, in two micro-batches a step."""
    options = parse_options(__doc__, argv)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, tokenizer = load_model(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    collate = PreferenceCollator(tokenizer.pad_token_id)

    def logits_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    dataset = tokenized_pairs(tokenizer)
    columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
    for batch in DataLoader(dataset, batch_size=options.batch_size, collate_fn=collate):
        batch = send_to_device(batch, accelerator.device)
        with torch.no_grad():
            sums = sequence_logps(logits_of(batch), batch["labels"])
        for column, half in zip(columns.values(), sums.chunk(2), strict=True):
            column.extend(half.tolist())
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)

    set_seed(0)
    loader = accelerator.prepare(
        DataLoader(dataset, batch_size=options.batch_size // 2, shuffle=True, drop_last=True, collate_fn=collate)
    )
    step = 0
    while step < options.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                out = fused_dil_loss(
                    logits_of(batch),
                    batch["labels"],
                    ref_chosen_logps=batch["ref_chosen_logps"],
                    ref_rejected_logps=batch["ref_rejected_logps"],
                    loss_type="lsif",
                )
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                margin = (out.chosen_rewards - out.rejected_rewards).mean()
                if step % 5 == 0 or step == options.steps - 1:
                    accelerator.print(f"step {step}  loss {out.loss.item():.4f}  margin {margin.item():.4f}")
                step += 1
                if step == options.steps:
                    break


if __name__ == "__main__":
    main()
