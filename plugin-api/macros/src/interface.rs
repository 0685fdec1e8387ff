//! `#[interface]`.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{
    Error, FnArg, GenericArgument, ItemTrait, LitStr, Pat, PathArguments, Result, ReturnType, TraitItem, Type, parse_quote,
};

struct Options {
    kind: LitStr,
    version: LitStr,
}

fn options(attributes: TokenStream) -> Result<Options> {
    let (mut kind, mut version) = (None, None);
    let parser = syn::meta::parser(|meta| {
        let slot = if meta.path.is_ident("kind") {
            &mut kind
        } else if meta.path.is_ident("version") {
            &mut version
        } else {
            return Err(meta.error("expected `kind` or `version`"));
        };
        *slot = Some(meta.value()?.parse()?);
        Ok(())
    });
    syn::parse::Parser::parse2(parser, attributes.clone())?;
    match (kind, version) {
        (Some(kind), Some(version)) => Ok(Options { kind, version }),
        _ => Err(Error::new_spanned(attributes, "expected `kind = \"..\", version = \"..\"`")),
    }
}

/// A type as it travels: an item or a stream of items.
struct Carried {
    stream: bool,
    item: Type,
}

/// The argument of `Name<..>`, if the type is one.
fn argument<'a>(ty: &'a Type, name: &str) -> Option<&'a Type> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last().filter(|last| last.ident == name)?;
    match &last.arguments {
        PathArguments::AngleBracketed(arguments) => match arguments.args.first() {
            Some(GenericArgument::Type(ty)) => Some(ty),
            _ => None,
        },
        _ => None,
    }
}

impl Carried {
    fn of(ty: &Type) -> Self {
        match argument(ty, "Stream") {
            Some(item) => Self { stream: true, item: item.clone() },
            None => Self { stream: false, item: ty.clone() },
        }
    }

    fn codec(&self) -> TokenStream {
        let item = &self.item;
        match item {
            Type::Path(path) if path.path.is_ident("Blob") => quote!(::fabstir_plugin_api::frame::Blobs),
            _ => quote!(::fabstir_plugin_api::frame::Plain<#item>),
        }
    }
}

pub fn expand(attributes: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let Options { kind, version } = options(attributes)?;
    let mut item: ItemTrait = syn::parse2(item)?;
    let name = item.ident.clone();
    let client = format_ident!("{name}Client");
    let (mut methods, mut calls, mut arms, mut described) = (vec![], vec![], vec![], vec![]);

    for member in &mut item.items {
        let TraitItem::Fn(method) = member else {
            return Err(Error::new_spanned(member, "an interface has methods only"));
        };
        let marked = method.attrs.iter().position(|attribute| attribute.path().is_ident("optional"));
        if let Some(index) = marked {
            method.attrs.remove(index);
        }
        let optional = marked.is_some();
        let signature = method.sig.clone();
        if signature.asyncness.is_none() {
            return Err(Error::new_spanned(&signature, "a method of an interface is async"));
        }
        let ident = &signature.ident;
        let text = ident.to_string();
        let full = format!("{}.{text}", kind.value());

        let mut inputs = signature.inputs.iter();
        if !matches!(inputs.next(), Some(FnArg::Receiver(receiver)) if receiver.reference.is_some() && receiver.mutability.is_none())
        {
            return Err(Error::new_spanned(&signature, "the first parameter is `&self`"));
        }
        if !matches!(inputs.next(), Some(FnArg::Typed(cx)) if matches!(*cx.ty, Type::Reference(_))) {
            return Err(Error::new_spanned(&signature, "the second parameter is `cx: &Cx`"));
        }
        let mut parameters = vec![];
        for input in inputs {
            let FnArg::Typed(input) = input else { unreachable!("`self` comes first") };
            let Pat::Ident(pattern) = &*input.pat else { return Err(Error::new_spanned(input, "a parameter is a name")) };
            parameters.push((pattern.ident.clone(), Carried::of(&input.ty)));
        }
        if parameters.iter().rev().skip(1).any(|(_, carried)| carried.stream) {
            return Err(Error::new_spanned(&signature, "a stream is the last parameter"));
        }
        let ReturnType::Type(_, output) = &signature.output else {
            return Err(Error::new_spanned(&signature, "a method returns `Result<..>`"));
        };
        let output = argument(output, "Result").ok_or_else(|| Error::new_spanned(output, "a method returns `Result<..>`"))?;
        let output = Carried::of(output);

        if optional {
            if method.default.is_some() {
                return Err(Error::new_spanned(&signature, "an optional method's body is generated"));
            }
            let unused = parameters.iter().map(|(ident, _)| quote!(let _ = #ident;));
            method.default = Some(parse_quote!({
                let _ = cx;
                #(#unused)*
                Err(::fabstir_plugin_api::error::PluginError::unimplemented(#full))
            }));
            method.semi_token = None;
        } else if method.default.is_some() {
            return Err(Error::new_spanned(&signature, "a method with a default is marked `#[optional]` and has no body"));
        }

        let required = !optional;
        methods.push(quote!(::fabstir_plugin_api::interface::Method { name: #text, required: #required }));

        let sent = parameters.iter().map(|(ident, carried)| {
            let codec = carried.codec();
            if carried.stream { quote!(.upload::<#codec>(#ident)) } else { quote!(.arg::<#codec>(#ident)) }
        });
        let codec = output.codec();
        let finish = if output.stream { quote!(open) } else { quote!(send) };
        let inputs = &signature.inputs;
        let returns = &signature.output;
        calls.push(quote! {
            async fn #ident(#inputs) #returns {
                self.0.request(cx, #full) #(#sent)* .#finish::<#codec>().await
            }
        });

        let read = parameters.iter().map(|(ident, carried)| {
            let codec = carried.codec();
            let how = if carried.stream { quote!(upload) } else { quote!(arg) };
            quote!(let #ident = call.#how::<#codec>()?;)
        });
        let passed = parameters.iter().map(|(ident, _)| ident);
        let answer = if output.stream { quote!(stream) } else { quote!(value) };
        arms.push(quote! {
            #full => {
                #(#read)*
                let answer = target.#ident(call.cx(), #(#passed),*).await?;
                call.#answer::<#codec>(answer)
            }
        });

        let shapes = parameters.iter().map(|(ident, carried)| {
            let (name, codec, stream) = (ident.to_string(), carried.codec(), carried.stream);
            quote!({
                let schema = <#codec as ::fabstir_plugin_api::frame::Codec>::schema(&mut generator);
                parameters.push(::fabstir_plugin_api::interface::described(Some(#name), #stream, schema));
            })
        });
        let returned = output.stream;
        described.push(quote!({
            let mut parameters = Vec::new();
            #(#shapes)*
            let schema = <#codec as ::fabstir_plugin_api::frame::Codec>::schema(&mut generator);
            let returns = ::fabstir_plugin_api::interface::described(None, #returned, schema);
            methods.push((#text, #required, parameters, returns));
        }));
    }

    let visibility = &item.vis;
    let documentation = format!("[`{name}`] over a session.");
    Ok(quote! {
        #item

        #[doc = #documentation]
        #visibility struct #client(::fabstir_plugin_api::session::Session);

        #[::async_trait::async_trait]
        impl #name for #client {
            #(#calls)*
        }

        impl ::fabstir_plugin_api::interface::Interface for dyn #name {
            const KIND: &'static str = #kind;
            const VERSION: &'static str = #version;
            const METHODS: &'static [::fabstir_plugin_api::interface::Method] = &[#(#methods),*];

            fn client(session: ::fabstir_plugin_api::session::Session) -> ::std::sync::Arc<Self> {
                ::std::sync::Arc::new(#client(session))
            }

            fn serve(
                target: ::std::sync::Arc<Self>,
                mut call: ::fabstir_plugin_api::session::Incoming,
            ) -> ::fabstir_plugin_api::session::ServeFuture {
                ::std::boxed::Box::pin(async move {
                    match call.method() {
                        #(#arms)*
                        other => Err(::fabstir_plugin_api::error::PluginError::unimplemented(other)),
                    }
                })
            }

            fn describe() -> ::fabstir_plugin_api::interface::Description {
                let mut generator = ::fabstir_plugin_api::interface::generator();
                let mut methods = Vec::new();
                #(#described)*
                ::fabstir_plugin_api::interface::document(Self::KIND, Self::VERSION, methods, generator)
            }
        }
    })
}
