"""What a model looks at in a picture, as one picture: `zoo look`."""

from zoo.look.attention import Attention, attention_from, layers_of
from zoo.look.class_map import ClassMap, class_map
from zoo.look.overview import look
from zoo.look.receptive_field import receptive_field

__all__ = ["Attention", "ClassMap", "attention_from", "class_map", "layers_of", "look", "receptive_field"]
