"""The operator's key in a fleet's directory, as it is or sealed under a passphrase."""

from __future__ import annotations

from pathlib import Path

from nacl.signing import SigningKey

from split_common.errors import KeysError
from split_common.system.files import read_private
from split_common.trust.passphrase import ask_passphrase, is_sealed, open_secret


class OperatorKey:
    """A fleet's `operator.key`, which only the operator's machine has.

    Args:
        path: the file.
        public: the key's public half, an Ed25519 key (32 bytes), by which the fleet knows it.
    """

    def __init__(self, path: Path, public: bytes) -> None:
        self._path = path
        self._public = public
        #: That of a sealed file, once the passphrase was given.
        self._seed: bytes | None = None

    def read(self) -> SigningKey:
        """The key. Asks for its passphrase once, if it is sealed.

        Raises:
            KeysError: the key is not here, damaged, or another operator's; or the passphrase is wrong.
        """
        if not self._path.exists():
            raise KeysError(f"{self._path} is not here; do this on the operator's machine")
        seed = read_private(self._path)
        if is_sealed(seed):
            if self._seed is None:
                try:
                    self._seed = open_secret(seed, ask_passphrase(self._path))
                except KeysError as error:
                    raise KeysError(f"{self._path}: {error}") from None
            seed = self._seed
        key = SigningKey(seed) if len(seed) == 32 else None
        if key is None or bytes(key.verify_key) != self._public:
            raise KeysError(f"{self._path} is damaged, or does not belong to operator.pub")
        return key
