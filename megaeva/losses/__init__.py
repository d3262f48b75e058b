"""Losses over the global batch."""

from megaeva.losses.contrastive import clip_loss as clip_loss
from megaeva.losses.contrastive import sigmoid_loss as sigmoid_loss
