"""Methods of the Hugging Face hub: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import nn

from protopush.errors import InputError, first_line
from protopush.models import hub_folder, model_card
from protopush.models.model_folder import Origin, read_run

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel

# All that is ever downloaded of a repository: tensors, text and pictures, nothing that could be unpickled.
FILES = ["config.json", "model.safetensors", "prototypes.json", "prototypes/*.jpg", "metrics.jsonl"]
OUTDATED = ["prototypes/*", "prototypes.png", "metrics.jsonl"]  # of an earlier model, unless uploaded again

M = TypeVar("M", bound="PretrainedMixin")


class PretrainedMixin(ModelHubMixin):
    """The three methods of ``ModelHubMixin``, on protopush's own run folders.

    Attributes:
        origin: where the model was read from; None for one that was made here.
    """

    origin: Origin | None = None

    @property
    def _whole(self) -> ProtoModel:
        return cast("ProtoModel", self)  # the class that has this one as its base

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model as a folder that :func:`protopush.load` and :meth:`from_pretrained` open.

        Unlike a run that training wrote, it names neither where on this computer the images lie nor their groups
        (patients), and it has a model card (``README.md``; one that you wrote yourself stays). The names of the
        prototypes' training images are in it, and their pictures where they are known: check them before you share.

        Args:
            save_directory: made where it isn't there; what it holds besides stays.
            config, model_card_kwargs: of ``ModelHubMixin``; not used, the model says it all.
            repo_id, push_to_hub, push_to_hub_kwargs: also upload it, see :meth:`push_to_hub`.

        Raises:
            InputError: the folder is a run that training wrote, or can't be written; it is as it was. Or the model's
                backbone or head is none of protopush's.
        """
        hub_folder.save(self._whole, Path(save_directory))  # ModelHubMixin's own would first delete config.json
        repository = repo_id or Path(save_directory).name
        return self.push_to_hub(repository, **push_to_hub_kwargs) if push_to_hub else None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        backbone: nn.Module | None = None,
    ) -> M:
        """The model of a folder or of a repository of the hub, in eval mode, with ``class_names``.

        Args:
            pretrained_model_name_or_path: a run folder, or ``name/of-a-repository``.
            force_download, token, cache_dir, local_files_only, revision: as ``snapshot_download`` takes them.
            backbone: the module itself, where it is one of your own, which no name could build again.

        Raises:
            InputError: there is no such repository, no network, or what is there is damaged.
        """
        # Not ModelHubMixin's: that would give entries of config.json to __init__, where they have the same names.
        folder, name = Path(pretrained_model_name_or_path), str(pretrained_model_name_or_path)
        if not folder.is_dir():
            with _in_one_line(f"cannot get {name} from the Hugging Face hub", "a folder, or its name there"):
                folder = Path(
                    snapshot_download(
                        name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                        allow_patterns=FILES,
                    )
                )
        return cast(M, read_run(folder, cls, backbone).model)

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes; returns the address of the commit.

        Args:
            repo_id: ``name/of-a-repository``; made where it isn't there.
            private: of a new repository. True unlike elsewhere: pictures of training images are in it. Leave them out
                with ``ignore_patterns=["prototypes/*", "prototypes.png"]``.
            options: as ``ModelHubMixin`` takes them: ``token``, ``commit_message``, ``branch``, ``create_pr``, ...

        Raises:
            InputError: the model can't be saved, the repository can't be written, or there is no network.
        """
        hub_folder.check(self._whole)  # before a repository is made
        with _in_one_line(f"cannot upload to {repo_id} on the Hugging Face hub", "a repository that is yours"):
            # What the repository shows of prototypes that the model no longer has, goes.
            options = {"delete_patterns": OUTDATED, **options}
            return str(super().push_to_hub(repo_id, private=private, **options))

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """The model card that :meth:`save_pretrained` writes."""
        return ModelCard(model_card.card(self._whole))


@contextmanager
def _in_one_line(what: str, expected: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as cause:  # no network, no such repository, no such name: each has a type of its own
        raise InputError(
            f"{what} ({type(cause).__name__}: {first_line(cause)}); expected {expected}, and a network connection; "
            "correct the name (private or gated: run `hf auth login`)"
        ) from cause
