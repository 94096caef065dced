"""Gradients with room beside them: dY already lies where its reader multiplies [dY, G].

A group's dX = [dY, G] [W; A] wants dY [T, N] in the left columns of a buffer [T, N + F]. The
gradient that reaches the down and the output projection was written just before by another fused
function, so that one leaves the room, and nothing is copied:

    down of layer l    reads what qkv's backward of layer l + 1 wrote    dh
    o of layer l       reads what the MLP's backward of layer l wrote    dh2

or, in the last layer and with norms behind the blocks, what a norm's backward wrote.

Who reads it is known when the writer runs forward: the function that made h (`h.grad_fn`) is the
one that gets dh, and it has said how many columns it wants. Everybody else, from stock layers to a
checkpoint's detached input, has asked for none, and gets a contiguous gradient.

The reader knows the buffer by an attribute of the very tensor object that the writer returned,
never by layout: the gradient of a `cat` looks the same, and its neighbours are someone's gradient.
A sum that autograd made of it, a hook's replacement, a cast or a view is another object, without
the attribute; it is copied as any gradient is. The attribute is the buffer itself, so that nothing
outlives the gradient, and taking it removes it: the room has one reader at a time. Of the left
columns nothing is ever written again; the gradient may be passed on, as that of a residual is.
"""

from typing import Any

from torch import Tensor

__all__ = ["ask_for_room", "give_room", "room_asked_by_the_maker", "take_room", "wide_gradient"]

_COLUMNS = "_lorafuse_gradient_columns"
_WIDE = "_lorafuse_gradient_wide"


def ask_for_room(ctx: Any, columns: int) -> None:
    """In a Function's forward: its backward wants `columns` beside its first output's gradient."""
    setattr(ctx, _COLUMNS, columns)


def room_asked_by_the_maker(x: Tensor) -> int:
    """Columns that the function that computed `x` wants beside x's gradient; mostly 0."""
    return int(getattr(x.grad_fn, _COLUMNS, 0))  # the node of a Python Function is its ctx


def wide_gradient(
    x: Tensor,  # (..., K), T rows
    room: int,
) -> Tensor | None:
    """[T, K + room] in x's dtype, whose left K columns are to hold x's gradient; None for none."""
    K = x.shape[-1]
    return x.new_empty((x.numel() // K, K + room)) if room else None


def give_room(
    dx: Tensor,  # (..., K), a view of wide's left columns
    wide: Tensor | None,  # (T, K + room)
) -> Tensor:
    """`dx`, the object that backward returns, with the room beside it."""
    if wide is not None:
        setattr(dx, _WIDE, wide)
    return dx


def take_room(ctx: Any, dy: Tensor) -> Tensor | None:
    """[T, N + what was asked for], whose left columns are `dy` [..., N]; or None.

    The right columns are the caller's to write, until its backward returns.
    """
    columns = getattr(ctx, _COLUMNS, 0)
    wide: Tensor | None = getattr(dy, _WIDE, None)
    if not columns or wide is None:
        return None
    delattr(dy, _WIDE)
    N = dy.shape[-1]
    left = wide[:, :N]
    # `dy.data = other` puts other memory under the same object.
    if (
        dy.dtype != wide.dtype
        or dy.data_ptr() != wide.data_ptr()
        or wide.shape[1] < N + columns
        or dy.numel() != left.numel()
        or dy.reshape(-1, N).stride() != left.stride()
    ):
        return None
    return wide[:, : N + columns]
