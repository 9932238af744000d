"""A node for tests only, as a custom node pack of one file: a file name whose output fits any input."""


class Any(str):
    def __ne__(self, other):
        return False

    __hash__ = str.__hash__


class Name:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("STRING", {})}}

    RETURN_TYPES = (Any("*"),)
    FUNCTION = "name"
    CATEGORY = "_for_testing"

    def name(self, value):
        return (value,)


NODE_CLASS_MAPPINGS = {"TestAnyName": Name}
