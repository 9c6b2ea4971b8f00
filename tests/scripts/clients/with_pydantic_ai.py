"""What Pydantic AI's agents do with text: run, stream, settings, conversations, responses."""

from __future__ import annotations

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from things import ADDRESS, EXPERT, MODEL, run

_provider = OpenAIProvider(base_url=f"{ADDRESS}/v1", api_key="none")
_SETTINGS = {"max_tokens": 16, "temperature": 0.0}
_agent = Agent(OpenAIChatModel(MODEL, provider=_provider), model_settings=_SETTINGS)


async def answer():
    found = await _agent.run("Who are you?")
    assert found.output and found.usage.output_tokens <= 16


async def streamed_answer():
    async with _agent.run_stream("Who are you?") as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True)]
    assert "".join(pieces).strip() == (await _agent.run("Who are you?")).output.strip()


async def system_prompt_and_second_turn():
    agent = Agent(
        OpenAIChatModel(MODEL, provider=_provider),
        model_settings=_SETTINGS,
        system_prompt="Be brief.",
    )
    first = await agent.run("Who are you?")
    second = await agent.run("Go on.", message_history=first.new_messages())
    assert second.output is not None


async def steering():
    outputs = [
        await Agent(
            OpenAIChatModel(EXPERT, provider=_provider),
            model_settings={**_SETTINGS, "extra_body": {"proxytune": {"alpha": alpha}}},
        ).run("Good morrow!")
        for alpha in (0, 1.5)
    ]
    assert outputs[0].output != outputs[1].output


async def responses():
    agent = Agent(OpenAIResponsesModel(MODEL, provider=_provider), model_settings=_SETTINGS)
    first = await agent.run("Who are you?")
    assert first.output
    second = await agent.run("Go on.", message_history=first.new_messages())
    assert second.output is not None


if __name__ == "__main__":
    run(globals())
