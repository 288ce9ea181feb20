"""Every sentence of the pages, in English and Russian, and the choice between the two.

The templates call `t('form.stop')`, which is `translate` with the page's language bound. Both catalogs have
the same keys and the same placeholders (tests/test_translations.py), and an unknown key raises: nothing falls
back in silence. Numbers stand beside their label ("Input tokens: 42"), so no plural form is ever needed.

Not here: the messages of errors. They carry numbers, are written once in English for the API and are shown as
they are under a translated heading and hint, found by the error's code (`error.<code>.title`, `.hint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from werkzeug.datastructures import LanguageAccept
from werkzeug.http import parse_accept_header

LANGUAGES: Final[tuple[tuple[str, str], ...]] = (("en", "English"), ("ru", "Русский"))
DEFAULT_LANGUAGE: Final = "en"

# Codes that have a heading and a hint. The error table of the service must name no other.
ERROR_CODES: Final[tuple[str, ...]] = (
    "invalid_request",
    "prompt_too_long",
    "tools_unsupported",
    "model_not_found",
    "unknown_field",
    "unauthorized",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "payload_too_large",
    "image_too_large",
    "unsupported_media_type",
    "unsupported_image",
    "invalid_image",
    "invalid_schema",
    "rate_limited",
    "token_budget_exhausted",
    "queue_full",
    "not_ready",
    "model_not_configured",
    "deadline_exceeded",
    "numeric_error",
    "internal_error",
)

_ENGLISH: Final[dict[str, str]] = {
    # How this language writes numbers.
    "number.decimal": ".",
    "number.group": ",",
    # The frame of every page.
    "nav.skip": "Skip to the content",
    "nav.label": "Main",
    "nav.docs": "API docs",
    "nav.docs_short": "API",
    "nav.language": "Language",
    "nav.home": "To the start page",
    "footer.version": "Version",
    "footer.request_id": "Request ID",
    "footer.links": "For operators",
    # The start page.
    "home.description": "Ask the text model Avibe or the vision model Avision, here or through the API.",
    "home.title": "Ask in words. Show a picture.",
    "home.lead": "Avibe answers in text. Avision answers questions about pictures. Use both here, or through the API.",
    "home.title_answer": "Answer",
    "home.models": "Models",
    "home.avibe": "Text model. Ask a question, or have something written, shortened or translated.",
    "home.avision": "Vision model. Show it one or more pictures and ask what is in them.",
    # The state of a model.
    "state.ready": "Ready",
    "state.loading": "Loading",
    "state.not_configured": "Not configured",
    "state.failed": "Failed",
    "state.demo": "Demo",
    "note.demo.avibe": "A small embedded model answers here, so that everything can be tried without a GPU. "
    "Expect simple and often wrong answers.",
    "note.demo.avision": "A tiny embedded model answers here, so that everything can be tried without a GPU. "
    "It knows only drawings of coloured shapes and price tags, and says so if asked about anything else.",
    "note.loading": "The model is still loading. You can write already; an answer comes once it is ready.",
    "note.failed": "The model could not be started. The reason is shown at",
    "note.not_configured": "This server runs without {model}. To turn it on, set {setting} to its model "
    "folder and restart the service.",
    # The forms.
    "form.prompt.avibe": "Your prompt",
    "form.prompt.avision": "Your question",
    "form.placeholder.avibe": "What is the capital of France?",
    "form.placeholder.avision": "What is in this picture?",
    "form.counter": "{count} / {limit}",
    "form.counter_over": "Too long by {count}",
    "form.max_tokens": "Max tokens",
    "form.max_tokens_hint": "Length of the answer, 1 to {limit}",
    "form.temperature": "Temperature",
    "form.temperature_hint": "0 to {limit}; higher is more varied",
    "form.api_key": "API key",
    "form.api_key_hint": "From the operator of this service; it begins with avito_",
    "form.image": "Pictures",
    "form.image_hint": "PNG, JPEG, WebP, GIF or BMP · at most {count} · {size}\N{NO-BREAK SPACE}MB in all",
    "form.image_again": "Browsers do not keep chosen files: please choose the pictures again.",
    "form.image_drop": "Choose, drop or paste pictures",
    "form.image_remove": "Remove {name}",
    "form.image_type": "Not a picture of a supported format: {name}",
    "form.image_count": "Too many pictures. At most: {limit}",
    "form.image_size": "Too big to send: {size}\N{NO-BREAK SPACE}MB. The limit is {limit}\N{NO-BREAK SPACE}MB in all.",
    "sample.title": "Or try one of these drawings:",
    "sample.save": "Save it, then choose it above.",
    "sample.chosen": "The drawing is chosen.",
    "sample.alt.shapes": "A red house, a blue star, a pink heart and a price tag",
    "sample.alt.group": "Four purple moons and a price tag",
    "sample.alt.inside": "A yellow cross inside a blue circle, and a price tag",
    "sample.question.shapes": "Describe the picture.",
    "sample.question.group": "How many moons are there?",
    "sample.question.inside": "What is inside the circle?",
    "form.submit.avibe": "Ask Avibe",
    "form.submit.avision": "Ask Avision",
    "form.stop": "Stop",
    # While an answer is on its way: seen, with the seconds so far, ...
    "form.sending": "Sending… {seconds}\N{NO-BREAK SPACE}s",
    "form.waiting": "Accepted. Waiting for the first words… {seconds}\N{NO-BREAK SPACE}s",
    "form.writing": "{seconds}\N{NO-BREAK SPACE}s · characters: {count}",
    "form.stopped_after": "Stopped after {seconds}\N{NO-BREAK SPACE}s · characters: {count}",
    # ... and said to screen readers.
    "form.working": "The request is on its way.",
    "form.begun": "The answer begins.",
    "form.stopped": "Stopped. What came so far is kept.",
    "form.answered": "The answer is ready.",
    "form.incomplete": "The answer is incomplete.",
    "form.refused": "The request was not answered.",
    # An answer.
    "result.title": "Answer",
    "result.empty": "The model ended its answer at once, without a word.",
    "result.copy": "Copy",
    "result.copied": "Copied",
    "result.generated_tokens": "Generated tokens",
    "result.input_tokens": "Input tokens",
    "result.total_time": "Time",
    "result.seconds": "{value}\N{NO-BREAK SPACE}s",
    "result.time_to_first_token": "First token",
    "result.tokens_per_second": "Speed",
    "result.per_second": "{value}\N{NO-BREAK SPACE}tokens/s",
    "result.finish_reason": "Ended",
    "result.finish.stop": "complete",
    "result.finish.length": "the limit of max tokens was reached",
    # The part for programs.
    "api.title": "For programs",
    "api.lead": "The same models answer over HTTP with JSON.",
    "api.example": "An example with curl",
    "api.docs": "API docs",
    "api.docs_text": "Every request and answer, to read and to try",
    "api.openapi": "OpenAPI",
    "api.openapi_text": "The same as a machine-readable description",
    "api.health": "Health",
    "api.health_text": "Whether the service and its models are well",
    # The API documentation.
    "docs.title": "API docs",
    "docs.description": "Every request and answer of the Avito AI API, to read and to try.",
    "docs.lead": "Every request and answer, to read and to try. As a machine-readable description:",
    "docs.no_script": "This viewer needs JavaScript. Without it, read the description itself:",
    # Errors: what is wrong, by code, and what to do.
    "error.status": "Error {status}",
    "error.details": "Details",
    "error.code": "Code",
    "error.network.title": "No answer from the server",
    "error.network.hint": "The connection broke off. Check that the service is running and try again.",
    "error.broken.title": "The connection broke off",
    "error.broken.hint": "The answer is incomplete: above is what came of it. Ask again to have the whole.",
    "error.field.prompt": "Check the prompt: it must not be empty. Limit in characters: {limit}",
    "error.field.max_tokens": "Check the max tokens: a whole number from 1 to {limit}.",
    "error.field.temperature": "Check the temperature: a number from 0 to {limit}.",
    "error.field.image": "Check the pictures: at least one is needed. At most: {limit}",
    "error.invalid_request.title": "Something in the form is not right",
    "error.invalid_request.hint": "Check what you entered and send it again.",
    "error.model_not_found.title": "There is no such model",
    "error.model_not_found.hint": "The models are avibe and avision, as far as they are set up here.",
    "error.tools_unsupported.title": "This model has no tools",
    "error.tools_unsupported.hint": "Ask without tools, or another model.",
    "error.prompt_too_long.title": "The prompt is too long",
    "error.prompt_too_long.hint": "Shorten the prompt, or ask for a shorter answer.",
    "error.unknown_field.title": "Unknown field",
    "error.unknown_field.hint": "Remove the field that the service does not know.",
    "error.unauthorized.title": "A valid key is needed",
    "error.unauthorized.hint": "Check the key, or ask the operator of the service for one.",
    "error.forbidden.title": "Not allowed",
    "error.forbidden.hint": "This is not open to you. The operator of the service decides who may do what.",
    "error.not_found.title": "Page not found",
    "error.not_found.hint": "Check the address, or begin at the start page.",
    "error.method_not_allowed.title": "This address does not work that way",
    "error.method_not_allowed.hint": "Open the start page and send the form from there.",
    "error.payload_too_large.title": "Too much data",
    "error.payload_too_large.hint": "Send fewer or smaller pictures, or a shorter prompt.",
    "error.image_too_large.title": "The picture is too large",
    "error.image_too_large.hint": "Make the picture smaller and send it again.",
    "error.unsupported_media_type.title": "Unsupported kind of data",
    "error.unsupported_media_type.hint": "Send the form from the start page, or read the API docs.",
    "error.unsupported_image.title": "Unsupported picture format",
    "error.unsupported_image.hint": "Choose a PNG, JPEG, WebP, GIF or BMP.",
    "error.invalid_image.title": "The picture cannot be read",
    "error.invalid_image.hint": "The file seems to be damaged. Choose another one, or save it anew.",
    "error.invalid_schema.title": "The JSON Schema cannot be used",
    "error.invalid_schema.hint": "Change or simplify the schema, or ask without one.",
    "error.rate_limited.title": "Too many requests",
    "error.rate_limited.hint": "Wait a little, then send it again.",
    "error.token_budget_exhausted.title": "The key's tokens for today are used up",
    "error.token_budget_exhausted.hint": "New ones come at midnight, UTC.",
    "error.queue_full.title": "The queue is full",
    "error.queue_full.hint": "Many requests are waiting already. Try again shortly.",
    "error.not_ready.title": "The model is not ready yet",
    "error.not_ready.hint": "It is still loading. Try again shortly.",
    "error.model_not_configured.title": "This model is not configured",
    "error.model_not_configured.hint": "The operator of the service can turn it on.",
    "error.deadline_exceeded.title": "It took too long",
    "error.deadline_exceeded.hint": "Try again, or ask for a shorter answer.",
    "error.numeric_error.title": "The model failed in its arithmetic",
    "error.numeric_error.hint": "Try again. If it comes back, give the request ID to the operator.",
    "error.internal_error.title": "Something went wrong on our side",
    "error.internal_error.hint": "Try again. If it comes back, give the request ID to the operator.",
}

_RUSSIAN: Final[dict[str, str]] = {
    "number.decimal": ",",
    "number.group": "\N{NO-BREAK SPACE}",
    "nav.skip": "Перейти к содержанию",
    "nav.label": "Основное меню",
    "nav.docs": "Документация API",
    "nav.docs_short": "API",
    "nav.language": "Язык",
    "nav.home": "На главную",
    "footer.version": "Версия",
    "footer.request_id": "ID запроса",
    "footer.links": "Для администратора",
    "home.description": "Спросите текстовую модель Avibe или модель зрения Avision — здесь или через API.",
    "home.title": "Спросите словами. Покажите картинку.",
    "home.lead": "Avibe отвечает на вопросы текстом, Avision разбирает изображения. "
    "Обе модели доступны здесь и через API.",
    "home.title_answer": "Ответ",
    "home.models": "Модели",
    "home.avibe": "Текстовая модель. Задайте вопрос или попросите написать, сократить, перевести.",
    "home.avision": "Модель зрения. Покажите одно или несколько изображений и спросите, что на них.",
    "state.ready": "Готова",
    "state.loading": "Загружается",
    "state.not_configured": "Не настроена",
    "state.failed": "Не запустилась",
    "state.demo": "Демо",
    "note.demo.avibe": "Здесь отвечает небольшая встроенная модель, чтобы всё можно было попробовать без GPU. "
    "Её ответы просты и часто ошибочны.",
    "note.demo.avision": "Здесь отвечает крошечная встроенная модель, чтобы всё можно было попробовать без GPU. "
    "Она знает только рисунки с цветными фигурами и ценниками, а о прочем так и скажет.",
    "note.loading": "Модель ещё загружается. Запрос можно писать уже сейчас, ответ будет, когда она загрузится.",
    "note.failed": "Модель не удалось запустить. Причина указана здесь:",
    "note.not_configured": "Этот сервер работает без {model}. Чтобы включить модель, укажите путь к её папке "
    "в {setting} и перезапустите сервис.",
    "form.prompt.avibe": "Ваш запрос",
    "form.prompt.avision": "Ваш вопрос",
    "form.placeholder.avibe": "Назовите столицу Франции.",
    "form.placeholder.avision": "Что на этой картинке?",
    "form.counter": "{count} / {limit}",
    "form.counter_over": "Лишних символов: {count}",
    "form.max_tokens": "Макс. токенов",
    "form.max_tokens_hint": "Длина ответа, от 1 до {limit}",
    "form.temperature": "Температура",
    "form.temperature_hint": "От 0 до {limit}; выше — разнообразнее",
    "form.api_key": "Ключ API",
    "form.api_key_hint": "Его выдаёт администратор сервиса; ключ начинается с avito_",
    "form.image": "Изображения",
    "form.image_hint": "PNG, JPEG, WebP, GIF или BMP · не более {count} шт. · до {size}\N{NO-BREAK SPACE}МБ вместе",
    "form.image_again": "Браузер не сохраняет выбранные файлы: выберите изображения ещё раз.",
    "form.image_drop": "Выберите, перетащите или вставьте изображения",
    "form.image_remove": "Убрать {name}",
    "form.image_type": "Файл не является изображением подходящего формата: {name}",
    "form.image_count": "Слишком много изображений. Можно не более: {limit}",
    "form.image_size": "Слишком большой объём: {size}\N{NO-BREAK SPACE}МБ. "
    "Предел — {limit}\N{NO-BREAK SPACE}МБ на все файлы.",
    "sample.title": "Или попробуйте один из этих рисунков:",
    "sample.save": "Сохраните его и выберите выше.",
    "sample.chosen": "Рисунок выбран.",
    "sample.alt.shapes": "Красный дом, синяя звезда, розовое сердце и ценник",
    "sample.alt.group": "Четыре фиолетовых месяца и ценник",
    "sample.alt.inside": "Жёлтый крест внутри синего круга и ценник",
    "sample.question.shapes": "Опиши картинку.",
    "sample.question.group": "Сколько здесь месяцев?",
    "sample.question.inside": "Что внутри круга?",
    "form.submit.avibe": "Спросить Avibe",
    "form.submit.avision": "Спросить Avision",
    "form.stop": "Остановить",
    "form.sending": "Отправляем… {seconds}\N{NO-BREAK SPACE}с",
    "form.waiting": "Запрос принят, ждём первых слов… {seconds}\N{NO-BREAK SPACE}с",
    "form.writing": "{seconds}\N{NO-BREAK SPACE}с · символов: {count}",
    "form.stopped_after": "Остановлено через {seconds}\N{NO-BREAK SPACE}с · символов: {count}",
    "form.working": "Запрос отправлен.",
    "form.begun": "Ответ начался.",
    "form.stopped": "Остановлено. То, что успело прийти, сохранено.",
    "form.answered": "Ответ готов.",
    "form.incomplete": "Ответ пришёл не полностью.",
    "form.refused": "Запрос остался без ответа.",
    "result.title": "Ответ",
    "result.empty": "Модель сразу завершила ответ, не написав ни слова.",
    "result.copy": "Копировать",
    "result.copied": "Скопировано",
    "result.generated_tokens": "Токенов в ответе",
    "result.input_tokens": "Токенов в запросе",
    "result.total_time": "Время",
    "result.seconds": "{value}\N{NO-BREAK SPACE}с",
    "result.time_to_first_token": "Первый токен",
    "result.tokens_per_second": "Скорость",
    "result.per_second": "{value}\N{NO-BREAK SPACE}токен/с",
    "result.finish_reason": "Завершение",
    "result.finish.stop": "ответ полный",
    "result.finish.length": "достигнут предел «Макс. токенов»",
    "api.title": "Для программ",
    "api.lead": "Те же модели отвечают по HTTP в формате JSON.",
    "api.example": "Пример с curl",
    "api.docs": "Документация API",
    "api.docs_text": "Все запросы и ответы: можно прочитать и попробовать",
    "api.openapi": "OpenAPI",
    "api.openapi_text": "То же в виде машиночитаемого описания",
    "api.health": "Состояние",
    "api.health_text": "Работают ли сервис и его модели",
    "docs.title": "Документация API",
    "docs.description": "Все запросы и ответы Avito AI API: можно прочитать и попробовать.",
    "docs.lead": "Все запросы и ответы: можно прочитать и попробовать. Машиночитаемое описание:",
    "docs.no_script": "Для просмотра нужен JavaScript. Без него можно прочитать само описание:",
    "error.status": "Ошибка {status}",
    "error.details": "Подробности",
    "error.code": "Код",
    "error.network.title": "Сервер не ответил",
    "error.network.hint": "Соединение прервалось. Проверьте, что сервис работает, и попробуйте ещё раз.",
    "error.broken.title": "Соединение прервалось",
    "error.broken.hint": "Ответ неполный: выше то, что успело прийти. Отправьте запрос ещё раз.",
    "error.field.prompt": "Проверьте запрос: он не должен быть пустым. Предел в символах: {limit}",
    "error.field.max_tokens": "Проверьте поле «Макс. токенов»: нужно целое число от 1 до {limit}.",
    "error.field.temperature": "Проверьте температуру: нужно число от 0 до {limit}.",
    "error.field.image": "Проверьте изображения: нужно хотя бы одно. Можно не более: {limit}",
    "error.invalid_request.title": "Форма заполнена неверно",
    "error.invalid_request.hint": "Проверьте введённые данные и отправьте запрос ещё раз.",
    "error.model_not_found.title": "Такой модели нет",
    "error.model_not_found.hint": "Модели: avibe и avision, если они здесь настроены.",
    "error.tools_unsupported.title": "У этой модели нет инструментов",
    "error.tools_unsupported.hint": "Спросите без инструментов или другую модель.",
    "error.prompt_too_long.title": "Запрос слишком длинный",
    "error.prompt_too_long.hint": "Сократите запрос или уменьшите число токенов.",
    "error.unknown_field.title": "Неизвестное поле",
    "error.unknown_field.hint": "Уберите поле, которого сервис не знает.",
    "error.unauthorized.title": "Нужен действующий ключ",
    "error.unauthorized.hint": "Проверьте ключ или получите его у администратора сервиса.",
    "error.forbidden.title": "Доступ запрещён",
    "error.forbidden.hint": "Вам это недоступно. Права доступа даёт администратор сервиса.",
    "error.not_found.title": "Страница не найдена",
    "error.not_found.hint": "Проверьте адрес или вернитесь на главную.",
    "error.method_not_allowed.title": "Этот адрес так не работает",
    "error.method_not_allowed.hint": "Откройте главную страницу и отправьте форму оттуда.",
    "error.payload_too_large.title": "Слишком большой объём данных",
    "error.payload_too_large.hint": "Отправьте меньше изображений, уменьшите их или сократите запрос.",
    "error.image_too_large.title": "Изображение слишком большое",
    "error.image_too_large.hint": "Уменьшите изображение и отправьте ещё раз.",
    "error.unsupported_media_type.title": "Неподдерживаемый тип данных",
    "error.unsupported_media_type.hint": "Отправьте форму с главной страницы или откройте документацию API.",
    "error.unsupported_image.title": "Неподдерживаемый формат изображения",
    "error.unsupported_image.hint": "Выберите PNG, JPEG, WebP, GIF или BMP.",
    "error.invalid_image.title": "Изображение не читается",
    "error.invalid_image.hint": "Похоже, файл повреждён. Выберите другой или сохраните его заново.",
    "error.invalid_schema.title": "JSON Schema не подходит",
    "error.invalid_schema.hint": "Измените или упростите схему либо отправьте запрос без неё.",
    "error.rate_limited.title": "Слишком много запросов",
    "error.rate_limited.hint": "Немного подождите и отправьте ещё раз.",
    "error.token_budget_exhausted.title": "Дневной запас токенов ключа исчерпан",
    "error.token_budget_exhausted.hint": "Новый запас появится в полночь по UTC.",
    "error.queue_full.title": "Очередь заполнена",
    "error.queue_full.hint": "Ответа уже ждёт много запросов. Попробуйте чуть позже.",
    "error.not_ready.title": "Модель ещё не готова",
    "error.not_ready.hint": "Она загружается. Попробуйте чуть позже.",
    "error.model_not_configured.title": "Эта модель не настроена",
    "error.model_not_configured.hint": "Включить её может администратор сервиса.",
    "error.deadline_exceeded.title": "Ответ занял слишком много времени",
    "error.deadline_exceeded.hint": "Попробуйте ещё раз или уменьшите число токенов.",
    "error.numeric_error.title": "Сбой в вычислениях модели",
    "error.numeric_error.hint": "Попробуйте ещё раз. Если сбой повторится, сообщите администратору ID запроса.",
    "error.internal_error.title": "Что-то пошло не так на нашей стороне",
    "error.internal_error.hint": "Попробуйте ещё раз. Если ошибка повторится, сообщите администратору ID запроса.",
}

CATALOGS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {"en": MappingProxyType(_ENGLISH), "ru": MappingProxyType(_RUSSIAN)}
)


def translate(lang: str, key: str, /, **values: object) -> str:
    """Return the sentence `key` in `lang`, its `{placeholders}` filled with `values`.

    The result is plain text, not markup: templates escape it like any other text. Any thread may call it.

    :raise KeyError: if the language, the key or the value of a placeholder is missing.
    """
    return CATALOGS[lang][key].format(**values)


def choose_language(requested: str | None, cookie: str | None, accept_language: str | None) -> str:
    """Return the language of a page: what `?lang=` asks for, else the cookie's, else the browser's best.

    :param requested: the value of `?lang=`; anything but a code of `LANGUAGES` counts as absent.
    :param cookie: the value of the cookie that remembers the last choice; the same holds.
    :param accept_language: the header `Accept-Language` as sent; `ru-RU` matches `ru`. Nothing that matches
        gives `DEFAULT_LANGUAGE`.
    """
    for choice in (requested, cookie):
        if choice is not None and choice in CATALOGS:
            return choice
    # Not `best_match`: it would take a plain `en` of low quality before `ru-RU`.
    for accepted, quality in parse_accept_header(accept_language, LanguageAccept):
        primary = accepted.partition("-")[0].lower()
        if quality > 0 and primary in CATALOGS:
            return primary
    return DEFAULT_LANGUAGE
