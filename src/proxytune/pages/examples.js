// Examples to begin with: a text and a message for each kind of expert. A recipe says nothing of what its experts are
// for except by their names; an expert whose name holds no word that is known here gets an example that suits any.

const MAX_EXAMPLES = 6;
const TOPICS = [
  { words: /shakespeare|verse|poem|poet|drama/i, text: "Good morrow, my good", chat: "Greet the king, who comes home from a war." },
  { words: /legal|law|contract/i, text: "The owner of a building shall", chat: "Explain what a contract is." },
  { words: /recipes|cook|food|kitchen/i, text: "Pancakes\n\n## Ingredients\n\n-", chat: "How do I make pancakes?" },
  { words: /python|code|coder|program/i, text: 'def read_lines(path):\n    """Return', chat: "Write a Python class for a bank account." },
  { words: /medic|health|clinic|pharma/i, text: "The symptoms of diabetes are", chat: "What are the symptoms of diabetes?" },
  { words: /math|gsm|algebra|equation/i, text: "Ann has 3 apples and buys 4 more. Now she has", chat: "Ann has 3 apples and buys 4 more. How many has she now?" },
  { words: /story|stories|fiction|novel/i, text: "The lighthouse had been dark for a year when", chat: "Tell me a story about a lighthouse." },
  { words: /safe|tox|harm|polite/i, text: "I am so angry that", chat: "My neighbour is noisy every night. What shall I say to him?" },
  { words: /instruct|chat|assistant|alpaca|dolly/i, text: "Three tips for staying healthy:", chat: "Give three tips for staying healthy." },
];
const ANY = [
  { text: "Once upon a time", chat: "What can you help me with?" },
  { text: "The most important thing to know is", chat: "Explain a rainbow to a child." },
  { text: "Dear customer,", chat: "Write a short thank-you note." },
];

// Return examples {expert, prompt} for a mode, "text" or "chat". Where the recipe sums several experts they name none:
// they leave the sum as it is.
const examplesFor = ({ experts, default_experts: ofDefault = [] }, mode) => {
  const isSum = ofDefault.length > 1;
  const names = [...new Set([...ofDefault, ...(isSum ? [] : experts.map(({ name }) => name))])];
  const found = new Map(); // from a prompt to its example: experts of one kind share a prompt, and the first has it
  const add = (prompt, expert) => {
    if (!found.has(prompt)) found.set(prompt, { prompt, expert });
  };
  const general = [...ANY];
  for (const name of names) {
    const own = TOPICS.find(({ words }) => words.test(name)) ?? general.shift();
    if (own) add(own[mode], isSum ? null : name);
  }
  while (found.size < 3 && general.length) add(general.shift()[mode], null);
  return [...found.values()].slice(0, MAX_EXAMPLES);
};
