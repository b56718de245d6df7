"""How far a training is: the events that bars and lines are made of."""

import time

from infra.child import emit

_EMIT_EVERY_S = 1.0
_SMOOTHING_S = 60.0


class Progress:
    """Says how far the training is, about once a second. On rank 0.

    Args:
        num_steps: Of the whole run.
        global_batch_size: Images a step.
        peak_images_per_s: What the devices could do if they did nothing but the UNet's multiplications at their peak;
            None where that is not known. The share of it that is reached is the MFU.
    """

    def __init__(self, num_steps: int, global_batch_size: int, peak_images_per_s: float | None = None) -> None:
        self._num_steps = num_steps
        self._global_batch_size = global_batch_size
        self._peak_images_per_s = peak_images_per_s
        self._step_began = self._said = time.monotonic()
        self._num_since = 0
        self._s_since = 0.0
        self._s_per_step: float | None = None

    def note(self, step: int, loss: float | None) -> dict[str, float]:
        """Counts a step.

        Args:
            step: Steps taken so far.
            loss: Of the step; None where there is none to tell.

        Returns:
            ``images_per_s`` of this step, and ``mfu`` (in [0, 1]) where the devices' peak is known.
        """
        now = time.monotonic()
        seconds = max(now - self._step_began, 1e-9)
        self._step_began = now
        self._num_since += 1
        self._s_since += seconds
        if now - self._said >= _EMIT_EVERY_S or step == self._num_steps:
            self._say(step, loss)
            self._said, self._num_since, self._s_since = now, 0, 0.0
        return self._speed(self._global_batch_size / seconds)

    def skip_pause(self) -> None:
        """The time since the last step was not training."""
        self._step_began = time.monotonic()

    def _say(self, step: int, loss: float | None) -> None:
        recent = self._s_since / self._num_since
        if self._s_per_step is None:
            self._s_per_step = recent
        weight = min(1.0, self._s_since / _SMOOTHING_S)  # a mean over about the last minute, whatever a step takes
        self._s_per_step += weight * (recent - self._s_per_step)
        emit(
            {
                "event": "step",
                "step": step,
                "num_steps": self._num_steps,
                "loss": loss,
                **{name: round(value, 4) for name, value in self._speed(self._global_batch_size / recent).items()},
                "left_s": round((self._num_steps - step) * self._s_per_step, 1),
            }
        )

    def _speed(self, images_per_s: float) -> dict[str, float]:
        speed = {"images_per_s": images_per_s}
        if self._peak_images_per_s is not None:
            speed["mfu"] = images_per_s / self._peak_images_per_s
        return speed
