//! Chat templates of strangers: each is refused, renders, or fails, within its bounds.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use spark_text::{ChatTemplate, RenderInput, Tokenizer};
use tempfile::TempDir;

use crate::folder::{model, scratch, write};

static FOLDER: LazyLock<TempDir> = LazyLock::new(scratch);
static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_dir(&model()).expect("the fixture is committed"));
static CONVERSATION: LazyLock<[Value; 2]> = LazyLock::new(|| {
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<|im_end|>\n{{ x }}"}]},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1, null, "ä"]}}}]},
        {"role": "tool", "content": "18", "tool_call_id": "a"},
    ]);
    let parameters = json!({"type": "object", "properties": {"x": {"type": "string"}}});
    [messages, json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}])]
});

/// The input is the template.
pub fn run(data: &[u8]) {
    let path = FOLDER.path().join("chat_template.jinja");
    write(&path, data);
    let Ok(template) = ChatTemplate::from_file(&path, FOLDER.path(), &TOKENIZER) else { return };
    let [messages, tools] = &*CONVERSATION;
    for tools in [None, Some(tools)] {
        let kwargs = Map::from_iter([("enable_thinking".to_owned(), Value::Bool(tools.is_some()))]);
        let input = RenderInput { messages, tools, kwargs: &kwargs, add_generation_prompt: tools.is_none() };
        if let Ok(segments) = template.render(input) {
            let _ = TOKENIZER.encode(&segments);
        }
    }
}
