"""What LangChain's ChatOpenAI and OpenAI do: invoke, stream, batch, async, second turns, logprobs."""

from __future__ import annotations

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from things import ADDRESS, EXPERT, MODEL, TEXT, run

_WHERE = {"base_url": f"{ADDRESS}/v1", "api_key": "none", "timeout": 120, "max_retries": 0}
_model = ChatOpenAI(model=MODEL, max_tokens=6, temperature=0, **_WHERE)


def invoke():
    answer = _model.invoke("Who are you?")
    assert answer.content and answer.usage_metadata["output_tokens"] <= 6
    assert answer.response_metadata["finish_reason"] in ("stop", "length")


def stream():
    pieces = list(_model.stream("Who are you?"))
    assert "".join(piece.content for piece in pieces) == _model.invoke("Who are you?").content


def batch():
    first, second = _model.batch(["Who are you?", "Who are you?"])
    assert first.content == second.content


async def invoke_and_stream_in_asyncio():
    answer = await _model.ainvoke("Who are you?")
    text = "".join([piece.content async for piece in _model.astream("Who are you?")])
    assert text == answer.content


def second_turn():
    turns = [SystemMessage("Be brief."), HumanMessage("Who are you?")]
    turns += [_model.invoke(turns), HumanMessage("Go on.")]
    assert _model.invoke(turns).content is not None


def chain_of_prompt_model_and_parser():
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Be {manner}."), ("user", "Who are you?")]
    )
    assert isinstance((prompt | _model | StrOutputParser()).invoke({"manner": "brief"}), str)


def logprobs():
    model = _model.bind(logprobs=True, top_logprobs=2)
    found = model.invoke("Who are you?").response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in found)


def completion():
    model = OpenAI(model=MODEL, max_tokens=6, temperature=0, **_WHERE)
    assert model.invoke(TEXT) == "".join(model.stream(TEXT)) != ""


def steering():
    base, steered = (
        ChatOpenAI(
            model=EXPERT,
            max_tokens=6,
            temperature=0,
            extra_body={"proxytune": {"alpha": alpha}},
            **_WHERE,
        ).invoke("Good morrow!")
        for alpha in (0, 1.5)
    )
    assert base.content != steered.content


def responses():
    model = ChatOpenAI(model=MODEL, max_tokens=16, temperature=0, use_responses_api=True, **_WHERE)
    answer = model.invoke("Who are you?")
    text = "".join(piece.text for piece in model.stream("Who are you?"))
    assert answer.text and text == answer.text
    turns = [HumanMessage("Who are you?"), answer, HumanMessage("Go on.")]
    assert model.invoke(turns).text is not None


def responses_that_follow_each_other():
    model = ChatOpenAI(
        model=MODEL,
        max_tokens=16,
        temperature=0,
        use_responses_api=True,
        use_previous_response_id=True,
        **_WHERE,
    )
    first = model.invoke("Who are you?")
    assert first.response_metadata["id"].startswith("resp_")
    assert model.invoke([HumanMessage("Who are you?"), first, HumanMessage("Go on.")]) is not None


if __name__ == "__main__":
    run(globals())
