"""How a user of transformers trains what they have chosen: padded batches, the loss on the responses, fused AdamW."""

import torch
from transformers import AutoTokenizer, PreTrainedModel

from litfreeze.data.batches import epoch_order


def plain_loop(model: PreTrainedModel, tokenizer_dir, records: list, epochs: int, batch: int, lr: float, seed: int):
    """The loss of every step over `records`, in the order in which litfreeze takes them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    samples = []
    for record in records:
        chat = [{"role": "user", "content": record["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        response = tokenizer.encode(record["completion"] + tokenizer.eos_token, add_special_tokens=False)
        samples.append((torch.tensor(prompt + response), torch.tensor([-100] * len(prompt) + response)))
    losses = []
    for epoch in range(epochs):
        order = epoch_order(len(samples), seed, epoch)
        for i in range(0, len(order), batch):
            ids, labels = zip(*(samples[j] for j in order[i : i + batch]), strict=True)
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses
