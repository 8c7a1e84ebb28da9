"""What clients ask an answer to look like, and the grammar of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from specformer_jax.grammars import grammar
from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.body import Body


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]

    @property
    def rule(self) -> str | None:
        """The answer, as a part of a grammar's rule; None where it may be anything."""
        return None


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]

    @property
    def rule(self) -> str:
        """See `TextFormat`."""
        return grammar.json_rule({"type": "object"})


class NamedSchema(Body):
    """A JSON schema and what it is called.

    Attributes:
      name, description: for the client.
      schema_: the schema, `schema` on the wire.
      strict: asks for answers that fit it, as all answers here do.
    """

    model_config = ConfigDict(populate_by_name=True)

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False

    @property
    def rule(self) -> str:
        """See `TextFormat`."""
        return grammar.json_rule(self.schema_)


class JsonSchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def rule(self) -> str:
        """See `TextFormat`."""
        return self.json_schema.rule


class FlatJsonSchemaFormat(NamedSchema):
    """The same as /v1/responses has it."""

    type: Literal["json_schema"]


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
FlatFormat = Annotated[TextFormat | JsonObjectFormat | FlatJsonSchemaFormat, Field(discriminator="type")]


def as_response_format(format: TextFormat | JsonObjectFormat | FlatJsonSchemaFormat) -> ResponseFormat:
    """The same as the other routes have it."""
    if not isinstance(format, FlatJsonSchemaFormat):
        return format
    schema = NamedSchema(**format.model_dump(exclude={"type"}, by_alias=True))
    return JsonSchemaFormat(type="json_schema", json_schema=schema)


class StructuredOutputs(Body):
    """vLLM's ways to say the same; exactly one is to be given.

    Attributes:
      json_: a JSON schema, as an object or as text; `json` on the wire.
      json_object: any JSON object.
      regex: what the whole answer matches.
      choice: the answers that there may be.
      grammar: rules of Lark or llama.cpp (GBNF).
    """

    model_config = ConfigDict(populate_by_name=True)

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> StructuredOutputs:
        if len(self.model_fields_set) > 1:
            message = "structured_outputs must have one of json, json_object, regex, choice and grammar"
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
        return self

    @property
    def as_grammar(self) -> str | None:
        """What the engine's requests take as `grammar`.

        Raises:
          UserError: it is no grammar.
        """
        if self.json_ is not None:
            return grammar.of_json_schema(self.json_)
        if self.regex is not None:
            return grammar.of_regex(self.regex)
        if self.choice is not None:
            return grammar.of_choice(self.choice)
        if self.grammar is not None:
            return grammar.of_rules(self.grammar)
        return grammar.of_json_schema() if self.json_object else None
