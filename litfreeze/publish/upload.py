"""`litfreeze upload`: a checkpoint to the Hugging Face Hub, with a card that says how it was made."""

from pathlib import Path
from typing import Literal, Optional


def setup(
    checkpoint_dir: Path,
    repo_id: str,
    format: Optional[Literal["hf", "peft", "litfreeze"]] = None,
    base_model: Optional[str] = None,
    base_dir: Optional[Path] = None,
    private: bool = False,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    dry_run: bool = False,
    out_dir: Optional[Path] = None,
) -> Optional[str]:
    """Upload a checkpoint to the Hugging Face Hub, with a model card: base, layers, data, losses and the command.

    Paths of this machine are left out of all that is uploaded; of the data and of a local base their name remains.

    Args:
        checkpoint_dir: What a run wrote, or any other checkpoint.
        repo_id: ORG/NAME on the Hub, made if it is not there.
        format: hf: what transformers and vLLM load, the default of a model and of a delta. peft: an adapter for PEFT,
            the default of one. litfreeze: the directory as it is.
        base_model: ORG/NAME of the base on the Hub, where it is not on record.
        base_dir: The base of an adapter or of a delta, where it is not where it was.
        private: Make the repository private.
        revision: A branch, made if it is not there.
        token: One that may write; HF_TOKEN, or what hf auth login keeps, needs no option.
        dry_run: Show what would be uploaded, and the card, without asking the Hub anything.
        out_dir: Keep what is uploaded in this directory.
    """
    import tempfile
    from contextlib import ExitStack

    from litfreeze.checkpoint.hub import check_token, make_repository, upload
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.errors import UsageError
    from litfreeze.hub import with_token
    from litfreeze.publish.card import compared_with_base, write_card
    from litfreeze.publish.public import base_of
    from litfreeze.publish.stage import stage
    from litfreeze.sizes import megabytes

    with ExitStack() as to_close:
        to_close.enter_context(with_token(token))
        checkpoint = open_checkpoint(checkpoint_dir, base_dir)
        form = format or ("hf" if checkpoint.lora is None else "peft")
        base = base_model or base_of(checkpoint)
        _check(checkpoint, form, repo_id, base_model, base, out_dir)
        checkpoint.tokenizer()  # an absent or broken one is told before anything is made
        if not dry_run:
            check_token(repo_id)
        card = write_card(checkpoint, form, repo_id, base, compared_with_base(checkpoint))
        try:
            folder = Path(out_dir or to_close.enter_context(tempfile.TemporaryDirectory(prefix=".upload-", dir=".")))
            stage(folder, checkpoint, form, base, card)
        except OSError as error:
            place = out_dir or Path.cwd()
            raise UsageError(
                f"What is uploaded cannot be written in {place}: {error.strerror}. Choose another place with --out_dir."
            ) from None
        for file in sorted(folder.iterdir()):
            print(f"{'Would be' if dry_run else 'Uploads':9} {file.name}, {megabytes(file.stat().st_size)}")
        if base is None:
            print("Note      No base is named on the Hub: --base_model ORG/NAME puts it into the card.")
        if dry_run:
            print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
            return None
        make_repository(repo_id, private, revision)  # now that there is something to put into it
        place = upload(repo_id, folder, revision, f"Upload {form} checkpoint with litfreeze")
    print(f"Written   {place}")
    return place


def _check(checkpoint, form: str, repo_id: str, base_model: Optional[str], base: Optional[str], out_dir) -> None:
    """Raises UsageError for what can be known to be wrong before anything is written or asked."""
    from litfreeze.errors import UsageError
    from litfreeze.hub import NAME
    from litfreeze.whole import check_new_directory

    named = NAME.fullmatch(repo_id)
    if named is None or named[2]:
        raise UsageError(f"{repo_id!r} is no name on the Hub. Write ORG/NAME; --revision names a branch.")
    if base_model is not None and not NAME.fullmatch(base_model):
        raise UsageError(f"--base_model {base_model!r} is no name on the Hub. Write ORG/NAME, or ORG/NAME@REVISION.")
    if form == "hf" and checkpoint.lora is not None:
        raise UsageError(
            f"--format hf: {checkpoint.path} is an adapter. Fold it in with litfreeze merge_lora, or say peft."
        )
    if form == "peft" and checkpoint.lora is None:
        raise UsageError(f"--format peft: {checkpoint.path} carries no adapter. Say hf or litfreeze.")
    if form == "litfreeze" and checkpoint.manifest is None:
        raise UsageError(
            f"--format litfreeze: {checkpoint.path} has no litfreeze.json. Say {'peft' if checkpoint.lora else 'hf'}."
        )
    if form == "peft" and base is None:
        raise UsageError(
            f"{checkpoint.path} adapts {checkpoint.base.path}, which nobody else has. Name it as it is on the Hub with "
            "--base_model ORG/NAME."
        )
    if out_dir is not None:
        check_new_directory(Path(out_dir))
